// Package delegated has the messages of SPIRE's Delegated Identity API that Sallyport uses.
package delegated

//go:generate protoc -I . --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative delegated.proto
