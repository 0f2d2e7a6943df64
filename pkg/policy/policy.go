// Package policy holds Sallyport's resources, the rules that make a set of them valid, and the one
// evaluator of access rules and grants.
package policy

import "fmt"

// APIVersion is the version of every resource.
const APIVersion = "sallyport.dev/v1alpha1"

// Kinds of resources.
const (
	KindProtectedService = "ProtectedService"
	KindBypassPolicy     = "BypassPolicy"
	KindKeyring          = "Keyring"
	KindDenyList         = "DenyList"
	KindGrantTemplate    = "GrantTemplate"
	KindResourceSet      = "ResourceSet"
	KindIdentityProvider = "IdentityProvider"
	KindRemoteService    = "RemoteService"
	KindRollout          = "Rollout"
	KindAgentConfig      = "AgentConfig"
)

// TypeMeta says what a document is.
type TypeMeta struct {
	APIVersion string `json:"apiVersion" yaml:"apiVersion"`
	Kind       string `json:"kind" yaml:"kind"`
}

// Metadata names a resource. A name is unique within its kind.
type Metadata struct {
	Name string `json:"name" yaml:"name"`
}

// Source is where a resource was read. It is no part of the resource itself.
type Source struct {
	File string
	Line int
}

// String gives "file:line", without the line for a resource of a cluster, and nothing for one that was not read from anywhere.
func (s Source) String() string {
	if s.Line == 0 {
		return s.File
	}
	return fmt.Sprintf("%s:%d", s.File, s.Line)
}
