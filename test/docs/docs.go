// Package docs holds the documents and examples of the repository to what is built.
package docs
