package reference

// Shape names what a packet is, for counts and messages.
type Shape string

// The shapes. Of the first group no part can reach a port; the second group can be judged by its ports or
// by its protocol; of the third nobody knows what is inside before it is there.
const (
	NotIP            Shape = "not IP"
	OtherVLAN        Shape = "another VLAN"
	IPv4Header       Shape = "IPv4 header refused"
	IPv4Length       Shape = "IPv4 length refused"
	IPv6Header       Shape = "IPv6 header refused"
	IPv6Length       Shape = "IPv6 length refused"
	IPv6Multicast    Shape = "multicast source"
	IPv6Loopback     Shape = "loopback address on the wire"
	ChainCut         Shape = "extension headers cut off"
	FragmentLength   Shape = "fragment of an impossible length"
	HopByHopLate     Shape = "hop-by-hop options not first"
	NoNextHeader     Shape = "no next header"
	TransportCut     Shape = "transport header cut off"
	TransportRefused Shape = "transport header refused"

	TCP           Shape = "TCP"
	TCPOptionsIP  Shape = "TCP behind IP options"
	TCPChain      Shape = "TCP behind extension headers"
	UDP           Shape = "UDP"
	UDPOptionsIP  Shape = "UDP behind IP options"
	UDPChain      Shape = "UDP behind extension headers"
	Authenticated Shape = "behind AH"
	FirstFragment Shape = "first fragment"
	LaterFragment Shape = "later fragment"
	ICMPQuery     Shape = "ICMP"
	ICMPError     Shape = "ICMP error"
	ICMPRedirect  Shape = "ICMP redirect"
	Tunnel        Shape = "tunnel"
	OtherProtocol Shape = "other protocol"
	Answer        Shape = "from a protected port"

	FirstFragmentCut Shape = "first fragment without its ports"
	Encrypted        Shape = "ESP"
)
