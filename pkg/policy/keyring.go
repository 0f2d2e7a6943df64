package policy

import (
	"fmt"
	"time"
)

// Keyring holds people and the public keys by which their signatures are known.
type Keyring struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     KeyringSpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// KeyringSpec is what a Keyring says.
type KeyringSpec struct {
	// People have names that are unique over all keyrings of a set.
	People []Person `json:"people" yaml:"people"`
}

// Person is somebody who may sign, with one or more keys.
type Person struct {
	Name string `json:"name" yaml:"name"`
	Keys []Key  `json:"keys" yaml:"keys"`
}

// Key is one public key of one person.
type Key struct {
	PublicKey PublicKey `json:"publicKey" yaml:"publicKey"`
	// NotAfter ends the key, by the wall clock. Zero: it does not end.
	NotAfter time.Time `json:"notAfter,omitzero" yaml:"notAfter,omitempty"`
}

// Expired reports whether the key counts no more at now.
func (k Key) Expired(now time.Time) bool { return !k.NotAfter.IsZero() && !now.Before(k.NotAfter) }

func (k *Keyring) validate(d *document) {
	d.report("metadata.name", CheckName(k.Name))
	if len(k.Spec.People) == 0 {
		d.report("spec.people", faultf("list at least one person with a key", "is empty"))
	}
	for i := range k.Spec.People {
		p := &k.Spec.People[i]
		field := fmt.Sprintf("spec.people[%d]", i)
		d.report(field+".name", CheckPersonName(p.Name))
		if len(p.Keys) == 0 {
			d.report(field+".keys", faultf("add a key: `sallyport keygen` makes one", "needs at least one key"))
		}
		for j := range p.Keys {
			key := &p.Keys[j]
			at := fmt.Sprintf("%s.keys[%d]", field, j)
			key.NotAfter = key.NotAfter.UTC()
			d.report(at+".notAfter", checkNotAfter(key.NotAfter))
			if key.PublicKey.IsZero() {
				d.report(at+".publicKey", faultf(publicKeyHint, "is missing"))
			}
		}
	}
}

// checkNotAfter keeps to the years that can be written and read again.
func checkNotAfter(t time.Time) error {
	if !t.IsZero() && (t.Year() < 1970 || t.Year() > 9999) {
		return faultf("write it like 2027-01-01T00:00:00Z", "the year %d is out of range", t.Year())
	}
	return nil
}
