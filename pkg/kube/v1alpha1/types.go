// Package v1alpha1 is the resources as the API of a cluster has them: the specs of package policy, with the metadata of Kubernetes and a
// status. The definitions in deploy/crds are generated from here. The agent believes nothing because the API server took it: what it
// reads is validated again, by package policy.
//
// +groupName=sallyport.dev
// +versionName=v1alpha1
package v1alpha1

//go:generate go run ../../../tools/crdgen -out ../../../deploy/crds

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Types and reasons of conditions. Nodes alone write them.
const (
	// ConditionAccepted says of a resource whether nodes take it as it is.
	ConditionAccepted = "Accepted"
	// ConditionVerified says of a grant that its envelope is signed as policy wants it, and for this node.
	ConditionVerified = "Verified"
	// ConditionActive says of a grant that its paths are open.
	ConditionActive = "Active"
	// ConditionEnded says of a grant that its paths were open and are not any more; it does not open again.
	ConditionEnded = "Ended"
)

// MaxConditions is how many conditions a status has room for.
const MaxConditions = 8

// ResourceStatus is what nodes make of a resource.
type ResourceStatus struct {
	// ObservedGeneration is the generation of the spec that the conditions are about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions are Accepted, with the field and the reason where it is not.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ProtectedService is ports that may be reached only through the proxy, once it is enforced.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=protectedservices,scope=Cluster,shortName=psvc,categories=sallyport
// +kubebuilder:printcolumn:name="Target",type=string,JSONPath=`.spec.target`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Protocol",type=string,JSONPath=`.spec.protocol`,priority=1
// +kubebuilder:printcolumn:name="Ports",type=string,JSONPath=`.spec.ports`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type ProtectedService struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              policy.ProtectedServiceSpec `json:"spec"`
	// +optional
	Status ResourceStatus `json:"status,omitzero"`
}

// RemoteService is a service on another node that workloads of this one reach as themselves.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=remoteservices,scope=Cluster,shortName=rsvc,categories=sallyport
// +kubebuilder:printcolumn:name="Addresses",type=string,JSONPath=`.spec.addresses`
// +kubebuilder:printcolumn:name="Ports",type=string,JSONPath=`.spec.ports`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type RemoteService struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              policy.RemoteServiceSpec `json:"spec"`
	// +optional
	Status ResourceStatus `json:"status,omitzero"`
}

// BypassPolicy is who may ask for what bypass.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=bypasspolicies,scope=Cluster,shortName=bpol,categories=sallyport
// +kubebuilder:printcolumn:name="Services",type=string,JSONPath=`.spec.services`
// +kubebuilder:printcolumn:name="Class",type=string,JSONPath=`.spec.class`
// +kubebuilder:printcolumn:name="Max",type=string,JSONPath=`.spec.maxDuration`
// +kubebuilder:printcolumn:name="Break Glass",type=boolean,JSONPath=`.spec.breakGlass`,priority=1
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type BypassPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              policy.BypassPolicySpec `json:"spec"`
	// +optional
	Status ResourceStatus `json:"status,omitzero"`
}

// GrantTemplate is a grant that is often asked for, made up in advance.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=granttemplates,scope=Cluster,shortName=gtpl,categories=sallyport
// +kubebuilder:printcolumn:name="Service",type=string,JSONPath=`.spec.service`
// +kubebuilder:printcolumn:name="Max",type=string,JSONPath=`.spec.maxDuration`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type GrantTemplate struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              policy.GrantTemplateSpec `json:"spec"`
	// +optional
	Status ResourceStatus `json:"status,omitzero"`
}

// Keyring is people and the public keys by which their signatures are known.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=keyrings,scope=Cluster,shortName=kring,categories=sallyport
// +kubebuilder:printcolumn:name="Version",type=integer,JSONPath=`.spec.version`
// +kubebuilder:printcolumn:name="People",type=string,JSONPath=`.spec.people[*].name`,priority=1
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Keyring struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              policy.KeyringSpec `json:"spec"`
	// +optional
	Status ResourceStatus `json:"status,omitzero"`
}

// DenyList is what is allowed nothing, whatever else allows it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=denylists,scope=Cluster,shortName=dlist,categories=sallyport
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.spec.reason`
// +kubebuilder:printcolumn:name="Until",type=string,JSONPath=`.spec.notAfter`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type DenyList struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              policy.DenyListSpec `json:"spec"`
	// +optional
	Status ResourceStatus `json:"status,omitzero"`
}

// IdentityProvider is an OpenID Connect provider whose tokens can prove callers.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=identityproviders,scope=Cluster,shortName=sidp,categories=sallyport
// +kubebuilder:printcolumn:name="Issuer",type=string,JSONPath=`.spec.issuer`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type IdentityProvider struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              policy.IdentityProviderSpec `json:"spec"`
	// +optional
	Status ResourceStatus `json:"status,omitzero"`
}

// ResourceSet is the set of all resources, its version and who has to sign what loosens it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=resourcesets,scope=Cluster,shortName=rset,categories=sallyport
// +kubebuilder:printcolumn:name="Version",type=integer,JSONPath=`.spec.version`
// +kubebuilder:printcolumn:name="Signers",type=integer,JSONPath=`.spec.signers`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type ResourceSet struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              policy.ResourceSetSpec `json:"spec"`
	// +optional
	Status ResourceStatus `json:"status,omitzero"`
}
