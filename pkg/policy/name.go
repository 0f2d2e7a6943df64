package policy

import (
	"regexp"
	"strings"
)

const (
	// MaxName is the longest name of a resource in bytes: it is a label in the kernel's maps.
	MaxName = 31
	// MaxNodeName is the longest name of a node in bytes.
	MaxNodeName = 253
	// MaxPersonName is the longest name of a person in bytes.
	MaxPersonName = 63
)

var (
	labelPattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	nodePattern  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	// hostPattern wants a letter at the head of the last label: a mistyped address is no host name.
	hostPattern   = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?\.)*[A-Za-z]([-A-Za-z0-9]*[A-Za-z0-9])?$`)
	personPattern = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9._@+]*[A-Za-z0-9])?$`)
	keyIDPattern  = regexp.MustCompile(`^sp:[0-9a-f]{16}$`)
	devicePattern = regexp.MustCompile(`^[!-.0-9;-~]{1,15}$`)
)

// maxText is the longest text that is told to people, in bytes.
const maxText = 512

// checkOneLine tells why a text cannot be shown beside others, or gives nil.
func checkOneLine(s string) error {
	if len(s) > maxText || strings.ContainsAny(s, "\n\t") {
		return faultf("shorten it to one line", "has %d bytes or more than one line; the most is %d", len(s), maxText)
	}
	return nil
}

// CheckName tells why s cannot be the name of a resource, or gives nil.
func CheckName(s string) error {
	if s == "" {
		return faultf("give it a name, like postgres", "is missing")
	}
	if len(s) > MaxName {
		return faultf("shorten it", "%q has %d bytes, the most is %d", s, len(s), MaxName)
	}
	if !labelPattern.MatchString(s) {
		return faultf("use a-z, 0-9 and -, with a letter or digit at both ends", "%q is not a DNS label", s)
	}
	return nil
}

// CheckNodeName tells why s cannot be the name of a node, or gives nil.
func CheckNodeName(s string) error {
	if s == "" {
		return faultf("name the node, like node-1", "is missing")
	}
	if len(s) > MaxNodeName || !nodePattern.MatchString(s) {
		return faultf("use a-z, 0-9, - and ., as in a host name", "%q is not the name of a node", s)
	}
	return nil
}

// CheckPersonName tells why s cannot be the name of a person, or gives nil.
func CheckPersonName(s string) error {
	if s == "" {
		return faultf("name the person, like alice", "is missing")
	}
	if len(s) > MaxPersonName || !personPattern.MatchString(s) {
		return faultf("use letters, digits and -._@+, at most 63 of them", "%q is not the name of a person", s)
	}
	return nil
}

func checkDevice(s string) error {
	if s == "." || s == ".." || !devicePattern.MatchString(s) {
		return faultf("write it as `ip link` shows it, at most 15 bytes", "%q is not the name of a network device", s)
	}
	return nil
}
