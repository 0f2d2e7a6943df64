package inventory

import "fmt"

// Kind is what a listener speaks, as far as its process and port tell.
type Kind string

// Kinds of listeners.
const (
	PostgreSQL Kind = "PostgreSQL"
	MySQL      Kind = "MySQL"
	Redis      Kind = "Redis"
	HTTP       Kind = "HTTP"
	SSH        Kind = "SSH"
	GRPC       Kind = "gRPC"
	Sallyport  Kind = "Sallyport"
	Unknown    Kind = "unknown"
)

var kindOfProgram = map[string]Kind{
	"postgres": PostgreSQL, "postmaster": PostgreSQL, "pgbouncer": PostgreSQL,
	"mysqld": MySQL, "mariadbd": MySQL,
	"redis-server": Redis, "redis-check-rdb": Redis, "valkey-server": Redis, // Debian's redis-server is a link to the latter name
	"nginx": HTTP, "apache2": HTTP, "httpd": HTTP, "caddy": HTTP, "lighttpd": HTTP, "traefik": HTTP,
	"sallyport": Sallyport, "sallyport-agent": Sallyport, "sallyport-proxy": Sallyport, "sallyport-collector": Sallyport,
	"sshd": SSH, "sshd-session": SSH, "dropbear": SSH,
}

var kindOfPort = map[uint16]Kind{
	22: SSH, 80: HTTP, 443: HTTP, 3306: MySQL, 5432: PostgreSQL, 6379: Redis, 6380: Redis, 8000: HTTP, 8080: HTTP, 8443: HTTP, 50051: GRPC,
}

// classify tells the kind, and by what. The program comes before the port: nothing keeps anybody from any port.
func classify(l Listener) (Kind, string) {
	if k, ok := kindOfProgram[l.Process.Name]; ok {
		return k, "by its program"
	}
	if k, ok := kindOfPort[l.Port]; ok && l.Protocol == TCP {
		return k, fmt.Sprintf("by its port alone, %d", l.Port)
	}
	return Unknown, "neither its program nor its port is known"
}
