// Package api is the generated protobuf of Sallyport's gRPC interfaces, and nothing else.
package api

//go:generate protoc -I . --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative sallyport.proto automation.proto
