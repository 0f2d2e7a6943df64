package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// KindBypassGrant is the kind of BypassGrant.
const KindBypassGrant = "BypassGrant"

// BypassGrant carries a signed grant to its node. The node verifies the signatures itself and opens its paths; deleting the resource
// ends them. A grant is used once: the same one, applied again, does not open again.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=bypassgrants,scope=Cluster,shortName=bgrant,categories=sallyport
// +kubebuilder:selectablefield:JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Service",type=string,JSONPath=`.status.service`
// +kubebuilder:printcolumn:name="Requester",type=string,JSONPath=`.status.requester`
// +kubebuilder:printcolumn:name="Verified",type=string,JSONPath=`.status.conditions[?(@.type=="Verified")].status`
// +kubebuilder:printcolumn:name="Active",type=string,JSONPath=`.status.conditions[?(@.type=="Active")].status`
// +kubebuilder:printcolumn:name="Until",type=string,JSONPath=`.status.until`
// +kubebuilder:printcolumn:name="Grant",type=string,JSONPath=`.status.id`,priority=1
// +kubebuilder:printcolumn:name="Why",type=string,JSONPath=`.status.conditions[?(@.type=="Verified")].message`,priority=1
// +kubebuilder:printcolumn:name="Ended",type=string,JSONPath=`.status.conditions[?(@.type=="Ended")].message`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type BypassGrant struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              BypassGrantSpec `json:"spec"`
	// +optional
	Status BypassGrantStatus `json:"status,omitzero"`
}

// BypassGrantSpec is the grant as it was signed. It cannot be changed: delete it and apply another under a new name.
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a grant cannot be changed: delete it, and apply another"
type BypassGrantSpec struct {
	// Envelope is the DSSE envelope, in JSON, byte for byte as `sallyport grant issue` wrote it. It is text and no object: what was
	// signed is not taken apart and put together again on its way to the node, and has one reader, which is that of files.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=65536
	// +kubebuilder:validation:XValidation:rule="self.startsWith('{') && self.contains('application/vnd.sallyport.grant.v1+json')",message="is not the envelope of a grant: take the file as `sallyport grant issue` wrote it"
	Envelope string `json:"envelope"`
	// Node is the one that the grant is for, as the envelope says it in audience. It only tells which node looks: a node that finds
	// another name in the envelope refuses it.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`
	Node string `json:"node"`
}

// BypassGrantStatus is what the node says of the grant, from the envelope that it verified. A grant is for one node, so that there is
// one such word.
type BypassGrantStatus struct {
	// ObservedGeneration is the generation of the spec that the node looked at.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// ID of the grant.
	// +optional
	// +kubebuilder:validation:MaxLength=26
	ID string `json:"id,omitempty"`
	// Service that it opens a way to.
	// +optional
	// +kubebuilder:validation:MaxLength=31
	Service string `json:"service,omitempty"`
	// Requester is who asked for it.
	// +optional
	// +kubebuilder:validation:MaxLength=2048
	Requester string `json:"requester,omitempty"`
	// Approvers are the others whose signatures count.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=2048
	Approvers []string `json:"approvers,omitempty"`
	// Until is the deadline of its paths.
	// +optional
	Until metav1.Time `json:"until,omitzero"`
	// Conditions are Verified, Active and Ended.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}
