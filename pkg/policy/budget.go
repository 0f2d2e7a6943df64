package policy

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes. As text it is a whole number with a unit: B, KiB, MiB, GiB or TiB.
// +kubebuilder:validation:MinLength=2
// +kubebuilder:validation:MaxLength=32
// +kubebuilder:validation:Pattern=`^(0|[1-9][0-9]{0,18})(B|KiB|MiB|GiB|TiB)$`
// +kubebuilder:validation:XValidation:rule="!isQuantity(self.substring(0, size(self) - 1)) || !quantity(self.substring(0, size(self) - 1)).isGreaterThan(quantity('1Ei'))",message="is more than 1048576TiB"
type Size uint64

// MaxSize is the largest size that can be written.
const MaxSize Size = 1 << 60

var sizeUnits = []struct {
	name string
	size Size
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

// String gives the largest unit that keeps the number whole: 10GiB, not 10240MiB.
func (s Size) String() string {
	for _, u := range sizeUnits {
		if s%u.size == 0 && s >= u.size {
			return fmt.Sprintf("%d%s", s/u.size, u.name)
		}
	}
	return "0B"
}

// MarshalText gives the form of String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the form of String; the unit need not be the largest.
func (s *Size) UnmarshalText(text []byte) error {
	for _, u := range sizeUnits {
		digits, ok := strings.CutSuffix(string(text), u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 64)
		if err != nil || digits != strconv.FormatUint(n, 10) || n > uint64(MaxSize/u.size) {
			break
		}
		*s = Size(n) * u.size
		return nil
	}
	return faultf("write a whole number with its unit, like 512MiB or 10GiB", "%q is not a size of at most %s", cut(string(text)), MaxSize)
}

// Budget is what each path of a grant may carry, both directions together. What is 0 is not limited.
type Budget struct {
	// Bytes of IP packets, headers included.
	Bytes Size `json:"bytes,omitempty" yaml:"bytes,omitempty"`
	// Packets as they are on the wire.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000000000000
	Packets uint64 `json:"packets,omitempty" yaml:"packets,omitempty"`
	// Connections in all.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000000000000
	Connections uint64 `json:"connections,omitempty" yaml:"connections,omitempty"`
	// ConnectionsPerSecond that may begin.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=4294967295
	// +kubebuilder:validation:Format=int64
	ConnectionsPerSecond uint32 `json:"connectionsPerSecond,omitempty" yaml:"connectionsPerSecond,omitempty"`
}

// String lists the limits, or says "unlimited".
func (b Budget) String() string {
	var parts []string
	for _, l := range b.limits() {
		if l.value != 0 {
			parts = append(parts, strings.TrimSpace(l.text(l.value)+" "+l.unit))
		}
	}
	if len(parts) == 0 {
		return "unlimited"
	}
	return strings.Join(parts, ", ")
}

// budgetLimit is one of the limits of a budget.
type budgetLimit struct {
	field, unit string
	value       uint64
	text        func(uint64) string
}

func (b Budget) limits() []budgetLimit {
	size := func(n uint64) string { return Size(n).String() }
	number := func(n uint64) string { return strconv.FormatUint(n, 10) }
	return []budgetLimit{
		{"bytes", "", uint64(b.Bytes), size},
		{"packets", "packets", b.Packets, number},
		{"connections", "connections", b.Connections, number},
		{"connectionsPerSecond", "connections a second", uint64(b.ConnectionsPerSecond), number},
	}
}

// CheckBudget tells which limit is beyond what can be counted, or gives nil.
func CheckBudget(b Budget) error {
	if b.Bytes > MaxSize || b.Packets > math.MaxInt64 || b.Connections > math.MaxInt64 {
		return faultf("ask for less", "is more than can be counted")
	}
	return nil
}

// budget refuses a limit that is missing or above that of the policy or template of that name.
func (c *grantCheck) budget(asked, allowed Budget, by string) {
	have := asked.limits()
	for i, most := range allowed.limits() {
		field := "budget." + most.field
		hint := fmt.Sprintf("ask for at most %s", most.text(most.value))
		switch l := have[i]; {
		case most.value == 0:
		case l.value == 0:
			c.refuse(field, hint, "%s requires a limit of at most %s", by, most.text(most.value))
		case l.value > most.value:
			c.refuse(field, hint, "%s is over the cap of %s in %s", l.text(l.value), most.text(most.value), by)
		}
	}
}
