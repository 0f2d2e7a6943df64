// Package apiserver runs a real API server of Kubernetes in a namespace of a lab, for tests. All of it has the build tag k8s.
package apiserver
