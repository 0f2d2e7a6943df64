// Package scale measures what many nodes cost an API server: each is what an agent has of it, without a datapath. `make bench-scale` runs it; all
// of it has the build tag k8s.
package scale
