// Package hostile holds the attacks of a workload with raw sockets against a node: every shape of packet,
// and every address that is not the sender's. Each is sent twice, to a node that enforces nothing and to one
// that does, and what arrives at the service's own stack is counted behind enforcement.
package hostile
