// Package api is the generated protobuf of Sallyport's gRPC interfaces, and the names that both ends of a connection say beside it.
package api

//go:generate protoc -I . --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative sallyport.proto automation.proto

// Names that both ends of a connection with a token say.
const (
	// ConnectProtocol is what a client offers in TLS (ALPN) to a service without http that takes tokens: it will show one by a
	// CONNECT request of HTTP/1.1, and the bytes of the service come behind the answer.
	ConnectProtocol = "sallyport-connect/1"
	// ReasonHeader and FlowHeader say in a refusal what the proxy's record of it says.
	ReasonHeader = "Sallyport-Reason"
	FlowHeader   = "Sallyport-Flow"
)
