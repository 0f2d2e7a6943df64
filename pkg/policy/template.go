package policy

import (
	"fmt"
	"slices"
	"strings"
)

// GrantTemplate is a grant that is often asked for, made up in advance: a grant that names it may say less, never more.
type GrantTemplate struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     GrantTemplateSpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// GrantTemplateSpec is what a GrantTemplate says. What is left out is left to the bypass policy.
type GrantTemplateSpec struct {
	// Service is the protected service that its grants are for.
	// +kubebuilder:validation:MinLength=1
	Service Name `json:"service" yaml:"service"`
	// Ports are those that a grant may name. Empty: all of the service.
	// +kubebuilder:validation:MaxItems=1024
	// +listType=set
	Ports []Port `json:"ports,omitempty" yaml:"ports,omitempty"`
	// Bindings are those that a grant may have. Empty: what the policy allows.
	// +kubebuilder:validation:MaxItems=3
	// +listType=set
	Bindings []Binding `json:"bindings,omitempty" yaml:"bindings,omitempty"`
	// Clients are the addresses that a grant may name. Empty: what the policy allows.
	// +kubebuilder:validation:MaxItems=256
	// +listType=atomic
	Clients []AddressRange `json:"clients,omitempty" yaml:"clients,omitempty"`
	// Ingress is the kind of device that the clients come by. Empty: any.
	Ingress Ingress `json:"ingress,omitempty" yaml:"ingress,omitempty"`
	// MaxDuration caps the duration, and is what is asked for where nothing else is said. More than 0, at most 24h.
	// +kubebuilder:validation:XValidation:rule="duration(self) > duration('0s') && duration(self) <= duration('24h')",message="must be more than 0s and at most 24h: every grant ends"
	MaxDuration Duration `json:"maxDuration" yaml:"maxDuration"`
	// MaxBudget caps what each path may carry. A grant must name every limit that is given here, and none above it.
	// +optional
	MaxBudget Budget `json:"maxBudget,omitzero" yaml:"maxBudget,omitempty"`
	// ReasonPrefix is what the reason begins with.
	ReasonPrefix Line `json:"reasonPrefix,omitempty" yaml:"reasonPrefix,omitempty"`
}

func (t *GrantTemplate) validate(d *document) {
	d.report("metadata.name", CheckName(t.Name))
	if t.Spec.Service == "" {
		d.report("spec.service", faultf("name the protected service that it is for", "is missing"))
	}
	if len(t.Spec.Ports) > 0 {
		d.checkPorts("spec.ports", t.Spec.Ports)
	}
	if len(t.Spec.Bindings) > 0 {
		d.checkList("spec.bindings", t.Spec.Bindings, "list bindings that the policy allows, or leave it out")
		for i, b := range t.Spec.Bindings {
			d.report(fmt.Sprintf("spec.bindings[%d]", i), CheckBinding(b))
		}
	}
	d.report("spec.reasonPrefix", checkOneLine(t.Spec.ReasonPrefix))
	d.report("spec.ingress", CheckIngress(t.Spec.Ingress))
	d.report("spec.maxBudget", CheckBudget(t.Spec.MaxBudget))
	d.report("spec.maxDuration", checkMaxDuration(t.Spec.MaxDuration.Duration))
}

// GrantTemplates lists the templates by name.
func (s *Set) GrantTemplates() []GrantTemplate {
	if s == nil {
		return nil
	}
	return slices.Clone(s.templates)
}

// GrantTemplate finds a template by its name.
func (s *Set) GrantTemplate(name string) (GrantTemplate, bool) {
	if s == nil {
		return GrantTemplate{}, false
	}
	i := slices.IndexFunc(s.templates, func(t GrantTemplate) bool { return t.Name == name })
	if i < 0 {
		return GrantTemplate{}, false
	}
	return s.templates[i], true
}

// template holds a grant to the template that it names, and to one of those that the policy asks for.
func (c *grantCheck) template(svc ProtectedService, g GrantFacts) {
	may := c.policy.Spec.Templates
	if len(may) > 0 && !slices.Contains(may, g.Template) {
		c.refuse("template", "ask by one of: "+strings.Join(may, ", "), "policy %q takes no grant by the template %q", c.policy.Name, g.Template)
		return
	}
	if g.Template == "" {
		return
	}
	t, ok := c.set.GrantTemplate(g.Template)
	if !ok {
		c.refuse("template", "leave it out, or name one that there is", "no GrantTemplate is named %q", g.Template)
		return
	}
	c.narrows(t, svc, g)
}

// narrows refuses what a grant says beyond its template.
func (c *grantCheck) narrows(t GrantTemplate, svc ProtectedService, g GrantFacts) {
	by := fmt.Sprintf("template %q", t.Name)
	beyond := func(field, format string, args ...any) {
		c.refuse(field, "ask for no more than the template, or without it", by+" "+format, args...)
	}
	if t.Spec.Service != g.Service {
		beyond("service", "is for %s, not for %s", t.Spec.Service, g.Service)
	}
	for i, port := range portsOr(g.Ports, svc.Spec.Ports) {
		if len(t.Spec.Ports) > 0 && !slices.Contains(t.Spec.Ports, port) {
			beyond(fmt.Sprintf("ports[%d]", i), "has no port %d", port)
		}
	}
	if len(t.Spec.Bindings) > 0 && !slices.Contains(t.Spec.Bindings, g.Binding) {
		beyond("binding", "has no binding %q", g.Binding)
	}
	for i, a := range g.Addresses {
		if len(t.Spec.Clients) > 0 && !slices.ContainsFunc(t.Spec.Clients, func(r AddressRange) bool { return r.Contains(a) }) {
			beyond(fmt.Sprintf("addresses[%d]", i), "has no client %s", a)
		}
	}
	if t.Spec.Ingress != "" && t.Spec.Ingress != g.Ingress {
		beyond("ingress", "is for clients behind %q alone", t.Spec.Ingress)
	}
	c.duration(g.Duration, t.Spec.MaxDuration, by)
	c.budget(g.Budget, t.Spec.MaxBudget, by)
	if !strings.HasPrefix(g.Reason, t.Spec.ReasonPrefix) {
		beyond("reason", "wants one that begins with %q", t.Spec.ReasonPrefix)
	}
}

// portsOr takes all of the service's ports for none.
func portsOr(asked, all []uint16) []uint16 {
	if len(asked) > 0 {
		return asked
	}
	return all
}
