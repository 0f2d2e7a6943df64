package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// PodSelector chooses pods of one namespace by what the cluster says of them. All that it says has to hold; one that says
// nothing but the namespace chooses all of its pods.
type PodSelector struct {
	// Namespace of the pods.
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	Namespace string `json:"namespace" yaml:"namespace"`
	// MatchLabels are labels that a pod has to have, with these values.
	// +kubebuilder:validation:MaxProperties=64
	MatchLabels map[string]LabelValue `json:"matchLabels,omitempty" yaml:"matchLabels,omitempty"`
	// MatchExpressions are more about labels, as a LabelSelector of Kubernetes has them.
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	MatchExpressions []LabelRequirement `json:"matchExpressions,omitempty" yaml:"matchExpressions,omitempty"`
	// ServiceAccount that a pod has to run as. Left out: any.
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)?$`
	ServiceAccount string `json:"serviceAccount,omitempty" yaml:"serviceAccount,omitempty"`
}

// LabelValue is what a label has.
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:Pattern=`^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$`
type LabelValue = string

// LabelOperator says how a label is compared.
// +kubebuilder:validation:Enum=In;NotIn;Exists;DoesNotExist
type LabelOperator string

// Operators of a LabelRequirement, with the meaning that they have in Kubernetes.
const (
	// LabelIn: the pod has the label, with one of the values.
	LabelIn LabelOperator = "In"
	// LabelNotIn: the pod has the label with none of the values, or not at all.
	LabelNotIn LabelOperator = "NotIn"
	// LabelExists: the pod has the label.
	LabelExists LabelOperator = "Exists"
	// LabelDoesNotExist: the pod has no such label.
	LabelDoesNotExist LabelOperator = "DoesNotExist"
)

// LabelRequirement is one thing that has to hold for the labels of a pod.
// +kubebuilder:validation:XValidation:rule="(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",message="values are for In and NotIn, which need at least one",fieldPath=".values"
type LabelRequirement struct {
	// Key of the label.
	// +kubebuilder:validation:MaxLength=317
	// +kubebuilder:validation:Pattern=`^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`
	Key string `json:"key" yaml:"key"`
	// Operator is In, NotIn, Exists or DoesNotExist.
	Operator LabelOperator `json:"operator" yaml:"operator"`
	// Values are for In and NotIn: at least one.
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Values []LabelValue `json:"values,omitempty" yaml:"values,omitempty"`
}

// Pod is what the cluster says of a pod of this node.
type Pod struct {
	UID            string            `json:"uid"`
	Namespace      string            `json:"namespace"`
	Name           string            `json:"name"`
	ServiceAccount string            `json:"serviceAccount,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`
	// Addresses are empty until the cluster tells of them.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// HostNetwork says that it has no network of its own.
	HostNetwork bool `json:"hostNetwork,omitempty"`
}

// String is its namespace and name.
func (p Pod) String() string { return p.Namespace + "/" + p.Name }

// Equal compares all that is known of two pods.
func (p Pod) Equal(q Pod) bool {
	return p.UID == q.UID && p.Namespace == q.Namespace && p.Name == q.Name && p.ServiceAccount == q.ServiceAccount &&
		p.HostNetwork == q.HostNetwork && maps.Equal(p.Labels, q.Labels) && slices.Equal(p.Addresses, q.Addresses)
}

// Matches says whether the selector chooses a pod.
func (s PodSelector) Matches(p Pod) bool {
	if p.Namespace != s.Namespace || (s.ServiceAccount != "" && p.ServiceAccount != s.ServiceAccount) {
		return false
	}
	return !slices.ContainsFunc(s.requirements(), func(r LabelRequirement) bool { return !r.holds(p.Labels) })
}

// requirements are what it says of labels, in one form.
func (s PodSelector) requirements() []LabelRequirement {
	all := slices.Clone(s.MatchExpressions)
	for key, value := range s.MatchLabels {
		all = append(all, LabelRequirement{Key: key, Operator: LabelIn, Values: []string{value}})
	}
	return all
}

func (r LabelRequirement) holds(labels map[string]string) bool {
	value, has := labels[r.Key]
	switch r.Operator {
	case LabelIn:
		return has && slices.Contains(r.Values, value)
	case LabelNotIn:
		return !has || !slices.Contains(r.Values, value)
	case LabelExists:
		return has
	case LabelDoesNotExist:
		return !has
	}
	return false
}

// covers says whether the selector chooses whatever the other one chooses. It may say no where nobody has thought of it.
func (s PodSelector) covers(of PodSelector) bool {
	if s.Namespace != of.Namespace || (s.ServiceAccount != "" && s.ServiceAccount != of.ServiceAccount) {
		return false
	}
	asked := of.requirements()
	return !slices.ContainsFunc(s.requirements(), func(r LabelRequirement) bool {
		return !slices.ContainsFunc(asked, r.follows)
	})
}

// follows says whether the requirement holds wherever the other one does.
func (r LabelRequirement) follows(from LabelRequirement) bool {
	if r.Key != from.Key {
		return false
	}
	switch r.Operator {
	case LabelIn:
		return from.Operator == LabelIn && isSubset(from.Values, r.Values)
	case LabelNotIn:
		return from.Operator == LabelDoesNotExist || from.Operator == LabelNotIn && isSubset(r.Values, from.Values)
	case LabelExists:
		return from.Operator == LabelExists || from.Operator == LabelIn
	}
	return from.Operator == r.Operator
}

func isSubset(small, large []string) bool {
	return !slices.ContainsFunc(small, func(v string) bool { return !slices.Contains(large, v) })
}

// String is like "pods of shop with app=web, tier in (a, b) as db".
func (s PodSelector) String() string {
	text := "pods of " + s.Namespace
	var labels []string
	for _, key := range slices.Sorted(maps.Keys(s.MatchLabels)) {
		labels = append(labels, key+"="+s.MatchLabels[key])
	}
	for _, r := range s.MatchExpressions {
		labels = append(labels, r.String())
	}
	if len(labels) > 0 {
		text += " with " + strings.Join(labels, ", ")
	}
	if s.ServiceAccount != "" {
		text += " as " + s.ServiceAccount
	}
	return text
}

// String is as kubectl has it.
func (r LabelRequirement) String() string {
	values := " (" + strings.Join(r.Values, ", ") + ")"
	switch r.Operator {
	case LabelIn:
		return r.Key + " in" + values
	case LabelNotIn:
		return r.Key + " notin" + values
	case LabelDoesNotExist:
		return "!" + r.Key
	}
	return r.Key
}

// How Kubernetes has names be written, and how long they may be.
var (
	dnsLabel  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	labelName = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
	dnsDomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
)

const (
	longLabel  = 63
	longDomain = 253
)

func (s PodSelector) validate(d *document) {
	const field = "spec.podSelector"
	switch {
	case s.Namespace == "":
		d.report(field+".namespace", faultf("name the namespace of the pods, like namespace: shop", "is missing"))
	case len(s.Namespace) > longLabel || !dnsLabel.MatchString(s.Namespace):
		d.report(field+".namespace", faultf("write it as kubectl get namespaces does", "%q is no name of a namespace", cut(s.Namespace)))
	}
	if a := s.ServiceAccount; a != "" && (len(a) > longDomain || !dnsDomain.MatchString(a)) {
		d.report(field+".serviceAccount", faultf("write its name alone, without the namespace", "%q is no name of a service account", cut(a)))
	}
	for _, key := range slices.Sorted(maps.Keys(s.MatchLabels)) {
		d.report(join(field+".matchLabels", key), checkLabel(key, s.MatchLabels[key]))
	}
	for i, r := range s.MatchExpressions {
		d.report(fmt.Sprintf("%s.matchExpressions[%d]", field, i), r.check())
	}
}

func (r LabelRequirement) check() error {
	listed := r.Operator == LabelIn || r.Operator == LabelNotIn
	switch {
	case !listed && r.Operator != LabelExists && r.Operator != LabelDoesNotExist:
		return faultf("write In, NotIn, Exists or DoesNotExist", "operator %q is not known", cut(string(r.Operator)))
	case listed && len(r.Values) == 0:
		return faultf("list the values, or write Exists or DoesNotExist", "%s needs at least one value", r.Operator)
	case !listed && len(r.Values) > 0:
		return faultf("remove the values, or write In or NotIn", "%s takes no values", r.Operator)
	}
	if err := checkLabel(r.Key, ""); err != nil {
		return err
	}
	for _, v := range r.Values {
		if err := checkLabel(r.Key, v); err != nil {
			return err
		}
	}
	return nil
}

// checkLabel tells why no pod can have such a label.
func checkLabel(key, value string) error {
	name := key
	if domain, rest, ok := strings.Cut(key, "/"); ok {
		if name = rest; len(domain) > longDomain || !dnsDomain.MatchString(domain) {
			return faultf("write it like example.org/name", "%q is no key of a label: what is before the / is no domain", cut(key))
		}
	}
	if len(name) > longLabel || !labelName.MatchString(name) {
		return faultf("write it like app or example.org/name", "%q is no key of a label", cut(key))
	}
	if value != "" && (len(value) > longLabel || !labelName.MatchString(value)) {
		return faultf("use letters, digits, - _ and ., 63 at most", "%q is no value of a label", cut(value))
	}
	return nil
}

// WithPods is the set with addresses in the places of selectors: those that each service's pods have. A service that has none keeps its
// selector. It is the set itself where nothing is selected.
func (s *Set) WithPods(addresses func(service string) []netip.Addr) *Set {
	if s == nil {
		return nil
	}
	services, changed := slices.Clone(s.services), false
	for i := range services {
		spec := &services[i].Spec
		if spec.PodSelector == nil {
			continue
		}
		if found := addresses(services[i].Name); len(found) > 0 {
			spec.PodSelector, spec.Addresses, changed = nil, found, true
		}
	}
	if !changed {
		return s
	}
	rest := *s
	rest.services, rest.byPlace = services, map[endpoint]int{}
	for i, svc := range services {
		rest.claim(i, svc)
	}
	return rest.withRemotes(s.remotes)
}

// Selects says whether any service of the set is of pods that are chosen by what they are.
func (s *Set) Selects() bool {
	return slices.ContainsFunc(s.Services(), func(svc ProtectedService) bool { return svc.Spec.PodSelector != nil })
}

// selector compares two selectors. One that surely chooses no less is tighter; anything else is left to rest.
func (c *comparison) selector(old *PodSelector, next **PodSelector) {
	if old != nil && *next != nil && (*next).covers(*old) && !same(old, *next) {
		settle(c, "spec.podSelector", old, next, false)
	}
}
