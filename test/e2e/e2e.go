// Package e2e holds the whole of Sallyport to what it promises: the real programs, in a network of their own.
package e2e
