// Package k8s has two real kubelets run our image, installed by our chart, on this machine: each node is a process with namespaces of its own,
// so that nothing of it outlives the test. `make test-k8s` runs it; it needs the build tag k8s.
package k8s
