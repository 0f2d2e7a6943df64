package policy

import (
	"net/netip"
	"strings"
	"time"
)

// Duration is a length of time in Go's syntax: 15m, 1h30m, 5s.
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=64
// +kubebuilder:validation:Pattern=`^([-+]?(([0-9]+([.][0-9]*)?|[.][0-9]+)(ns|us|µs|μs|ms|s|m|h))+|[-+]?0)$`
type Duration struct{ time.Duration }

// String gives the shortest form: 15m, not 15m0s.
func (d Duration) String() string {
	s := d.Duration.String()
	if short, ok := strings.CutSuffix(s, "m0s"); ok {
		s = short + "m"
	}
	if short, ok := strings.CutSuffix(s, "h0m"); ok {
		s = short + "h"
	}
	return s
}

// MarshalText gives the form of String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads Go's syntax. The range is left to whoever knows what the duration is for.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return faultf("write a number with its unit, like 15m, 90s or 1h30m", "%q is not a duration", text)
	}
	d.Duration = v
	return nil
}

// AddressRange is one address or the addresses of a prefix.
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=64
// +kubebuilder:validation:XValidation:rule="isIP(self) || isCIDR(self)",message="is neither an IP address nor a prefix: write 10.1.0.2, 10.1.0.0/24 or fd00:1::/64"
// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || cidr(self) == cidr(self).masked()",message="has bits set beyond its prefix length"
type AddressRange struct{ netip.Prefix }

// String gives a single address without a prefix length.
func (r AddressRange) String() string {
	if r.IsSingleIP() {
		return r.Addr().String()
	}
	return r.Prefix.String()
}

// MarshalText gives the form of String.
func (r AddressRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads an address or a prefix whose host bits are zero.
func (r *AddressRange) UnmarshalText(text []byte) error {
	s := string(text)
	if addr, err := netip.ParseAddr(s); err == nil {
		if err := checkFamily(addr); err != nil {
			return err
		}
		r.Prefix = netip.PrefixFrom(addr, addr.BitLen())
		return nil
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		return faultf("write an address or a prefix, like 10.1.0.2, 10.1.0.0/24 or fd00:1::/64",
			"%q is neither an IP address nor a prefix", s)
	}
	if a := prefix.Addr(); a.Is4In6() {
		plain := netip.PrefixFrom(a.Unmap(), max(prefix.Bits()-96, 0))
		return faultf("write "+plain.Masked().String(), "%s is an IPv4 prefix mapped into IPv6", s)
	}
	if prefix != prefix.Masked() {
		return faultf("write "+prefix.Masked().String()+", or the address alone",
			"%s has bits set beyond its prefix length", s)
	}
	r.Prefix = prefix
	return nil
}

// checkFamily refuses the two ways in which one address has several spellings.
func checkFamily(a netip.Addr) error {
	if a.Is4In6() {
		return faultf("write "+a.Unmap().String(), "%s is an IPv4 address mapped into IPv6", a)
	}
	if a.Zone() != "" {
		return faultf("write it without %"+a.Zone(), "%s has a zone", a)
	}
	return nil
}

// CheckAddress tells why an address cannot be that of a service or of a client, or gives nil. A
// loopback address passes: whether it may stand is for the caller to say.
func CheckAddress(a netip.Addr) error {
	if !a.IsValid() {
		return faultf("write one address, like 10.2.0.2 or fd00:2::2", "is not an IP address")
	}
	if err := checkFamily(a); err != nil {
		return err
	}
	switch {
	case a.IsUnspecified():
		return faultf("name the address itself", "%s means every address", a)
	case a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return faultf("name an address of one host", "%s is not the address of one host", a)
	case a.IsLinkLocalUnicast():
		return faultf("name a routable address", "%s is link-local and differs from link to link", a)
	}
	return nil
}

// first keeps the first place of each value: it gives that place for a value seen before.
func first[T comparable](seen map[T]int, value T, place int) (int, bool) {
	if at, ok := seen[value]; ok {
		return at, true
	}
	seen[value] = place
	return place, false
}
