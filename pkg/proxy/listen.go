package proxy

import "net"

// Listen opens the proxy's transparent listeners, IPv4 first, in the network namespace of the calling thread, for another
// proxy that takes this one's place and cannot make its own. The caller closes them. It needs CAP_NET_RAW there.
func Listen(port uint16) ([]*net.TCPListener, error) { return listenBoth(port) }
