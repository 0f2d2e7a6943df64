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
	// Version counts up with each change: a node takes none that is lower than the one it has, but where as many people have signed
	// that as a looser set asks for. At least 1.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000000000000000
	Version uint64 `json:"version" yaml:"version"`
	// NotAfter ends every key of it, by the wall clock. Zero: it does not end.
	// +optional
	NotAfter time.Time `json:"notAfter,omitzero" yaml:"notAfter,omitempty"`
	// People have names that are unique over all keyrings of a set.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=1024
	// +listType=map
	// +listMapKey=name
	People []Person `json:"people" yaml:"people"`
	// Groups have names that are unique over all keyrings of a set, and members from any of them.
	// +kubebuilder:validation:MaxItems=128
	// +listType=map
	// +listMapKey=name
	Groups []Group `json:"groups,omitempty" yaml:"groups,omitempty"`
	// RevokedKeys are the ids of keys that count no more, in this keyring or another.
	// +kubebuilder:validation:MaxItems=4096
	// +listType=atomic
	RevokedKeys []KeyID `json:"revokedKeys,omitempty" yaml:"revokedKeys,omitempty"`
}

// Person is somebody who may sign, with one or more keys.
type Person struct {
	// +kubebuilder:validation:MinLength=1
	Name PersonName `json:"name" yaml:"name"`
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=32
	// +listType=map
	// +listMapKey=publicKey
	Keys []Key `json:"keys" yaml:"keys"`
}

// Key is one public key of one person.
type Key struct {
	PublicKey PublicKey `json:"publicKey" yaml:"publicKey"`
	// NotAfter ends the key, by the wall clock. Zero: it does not end.
	// +optional
	NotAfter time.Time `json:"notAfter,omitzero" yaml:"notAfter,omitempty"`
	// Uses are what it may sign. Empty: requests and approvals.
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	Uses []Use `json:"uses,omitempty" yaml:"uses,omitempty"`
}

func (k *Keyring) validate(d *document) {
	d.report("metadata.name", CheckName(k.Name))
	if k.Spec.Version == 0 {
		d.report("spec.version", faultf("begin with version: 1 and count up with each change", "is missing"))
	}
	k.Spec.NotAfter = k.Spec.NotAfter.UTC()
	d.report("spec.notAfter", checkNotAfter(k.Spec.NotAfter))
	if len(k.Spec.People) == 0 {
		d.report("spec.people", faultf("list at least one person with a key", "is empty"))
	}
	for i := range k.Spec.People {
		k.Spec.People[i].validate(d, fmt.Sprintf("spec.people[%d]", i))
	}
	for i, g := range k.Spec.Groups {
		field := fmt.Sprintf("spec.groups[%d]", i)
		d.report(field+".name", CheckName(g.Name))
		d.checkList(field+".members", g.Members, "list the people of the group")
	}
	for i, id := range k.Spec.RevokedKeys {
		d.report(fmt.Sprintf("spec.revokedKeys[%d]", i), checkKeyID(id))
	}
}

func (p *Person) validate(d *document, field string) {
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
		for u, use := range key.Uses {
			if !uses[use] {
				d.report(fmt.Sprintf("%s.uses[%d]", at, u), faultf(suggest(string(use), texts(uses)), "keys have no use %q", use))
			}
		}
	}
}

func texts(list map[Use]bool) map[string]bool {
	out := map[string]bool{}
	for u := range list {
		out[string(u)] = true
	}
	return out
}

func checkKeyID(id string) error {
	if !keyIDPattern.MatchString(id) {
		return faultf("write it as `sallyport keygen` prints it", "%q is not the id of a key", id)
	}
	return nil
}

// checkNotAfter keeps to the years that can be written and read again.
func checkNotAfter(t time.Time) error {
	if !t.IsZero() && (t.Year() < 1970 || t.Year() > 9999) {
		return faultf("write it like 2027-01-01T00:00:00Z", "the year %d is out of range", t.Year())
	}
	return nil
}
