package policy

// SignatureFile is the file in a directory of resources that holds the signatures of their set.
const SignatureFile = "resources.dsse"

// ResourceSet speaks of the set that it is in. A set has at most one. Its name tells sets for different nodes apart: where
// signatures are required, a node takes what is signed for that name alone (AgentConfigSpec.PolicySet).
type ResourceSet struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     ResourceSetSpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// ResourceSetSpec is what a ResourceSet says.
type ResourceSetSpec struct {
	// Version counts up with each set that is signed: where signatures are required, none but a higher one loosens what is in
	// force. At least 1.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000000000000000
	Version uint64 `json:"version" yaml:"version"`
	// Signers is how many people have to sign what loosens this set; 1 when it is not written.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=16
	Signers uint8 `json:"signers,omitempty" yaml:"signers,omitempty"`
}

// maxSigners is what an envelope has room for.
const maxSigners = 16

func (r *ResourceSet) validate(d *document) {
	d.report("metadata.name", CheckName(r.Name))
	if r.Spec.Version == 0 {
		d.report("spec.version", faultf("begin with version: 1 and count up with each set that is signed", "is missing"))
	}
	if r.Spec.Signers > maxSigners {
		d.report("spec.signers", faultf("ask for fewer", "%d are more than the %d that can sign", r.Spec.Signers, maxSigners))
	}
}

// checkOneSet reports a second ResourceSet.
func (p *parser) checkOneSet() {
	for i, l := range p.sets {
		if i > 0 {
			l.report("", faultf("remove one of them", "a set has one ResourceSet, and there is another at %s", p.sets[0].source()))
		}
	}
}

// Name is that of the ResourceSet; empty for a set without one.
func (s *Set) Name() string {
	if s == nil || len(s.sets) == 0 {
		return ""
	}
	return s.sets[0].Name
}

// Version is that of the ResourceSet; 0 for a set without one.
func (s *Set) Version() uint64 {
	if s == nil || len(s.sets) == 0 {
		return 0
	}
	return s.sets[0].Spec.Version
}

// Signers is how many people have to sign what loosens the set, at least 1.
func (s *Set) Signers() int {
	if s == nil || len(s.sets) == 0 {
		return 1
	}
	return max(int(s.sets[0].Spec.Signers), 1)
}

// WithVersionOf is the set with the ResourceSet that another has, or with none where that has none.
func (s *Set) WithVersionOf(other *Set) *Set {
	with := *s
	with.sets = nil
	if other != nil {
		with.sets = other.sets
	}
	return with.withRemotes(with.remotes)
}

// PinnedKey is a key that a node's configuration names: of somebody of its own, who may sign resources. No keyring says
// anything of it: it neither ends nor is revoked but by the configuration, and who also has a key of a keyring counts twice.
func PinnedKey(k PublicKey) KnownKey {
	return KnownKey{Key: Key{PublicKey: k, Uses: []Use{UseResources}}, Person: "pinned " + k.ID()}
}
