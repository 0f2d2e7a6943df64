package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxFile is the largest file that is read, in bytes.
const maxFile = 16 << 20

// located is a resource with the document that it came from.
type located[T any] struct {
	*document
	value T
}

// parser gathers the resources of one set.
type parser struct {
	problems
	services []located[ProtectedService]
	policies []located[BypassPolicy]
	keyrings []located[Keyring]
	denials  []located[DenyList]

	templates []located[GrantTemplate]
	sets      []located[ResourceSet]
	providers []located[IdentityProvider]
	remotes   []located[RemoteService]
	rollouts  []located[Rollout]
}

// Parse reads a set of resources from YAML documents and validates it as a whole. name is the file
// name in errors. Every problem comes back at once, as errors.Join of *Error. A set without a
// protected or remote service is an error: it would protect nothing.
func Parse(name string, data []byte) (*Set, error) {
	p := &parser{}
	p.read(name, data)
	return p.set(name)
}

// Document is one resource that is in no file. Name is what errors call it.
type Document struct {
	Name string
	Data []byte
}

// ParseDocuments is Parse for resources that are from elsewhere than from files: no error tells a line. where is what an error about
// the whole names.
func ParseDocuments(where string, all []Document) (*Set, error) {
	p := &parser{}
	for _, one := range all {
		for _, d := range documents(one.Name, one.Data, &p.problems) {
			d.unlined = true
			p.resource(d)
		}
	}
	return p.set(where)
}

// set validates what was read as a whole. where is what an error about the whole names.
func (p *parser) set(where string) (*Set, error) {
	if len(p.services)+len(p.remotes)+len(p.list) == 0 {
		p.add(&Error{
			File: where, Msg: "no ProtectedService or RemoteService: the set would protect nothing",
			Hint: "name every file of the set together; to stop protecting a node, use `sallyport uninstall`",
		})
	}
	sure := p.sureOfNames()
	p.checkNames()
	p.checkOverlaps()
	p.checkRemotes()
	p.checkPeople()
	p.checkOneSet()
	if sure {
		p.checkReferences()
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return newSet(&Set{services: values(p.services), policies: values(p.policies), keyrings: values(p.keyrings),
		denials: values(p.denials), templates: values(p.templates), sets: values(p.sets), providers: values(p.providers),
		remotes: values(p.remotes), rollouts: values(p.rollouts)}), nil
}

func values[T any](list []located[T]) []T {
	out := make([]T, 0, len(list))
	for _, l := range list {
		out = append(out, l.value)
	}
	return out
}

func (p *parser) read(file string, data []byte) {
	for _, d := range documents(file, data, &p.problems) {
		p.resource(d)
	}
}

// documents splits a file. A syntax error ends it, with what came before kept.
func documents(file string, data []byte, p *problems) []*document {
	if len(data) > maxFile {
		p.add(&Error{File: file, Msg: fmt.Sprintf("has more than %d bytes", maxFile), Hint: "split it into several files"})
		return nil
	}
	var out []*document
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var n yaml.Node
		err := dec.Decode(&n)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			p.add(syntaxError(file, err))
			return out
		}
		if len(n.Content) > 0 && !isEmpty(n.Content[0]) {
			out = append(out, newDocument(file, n.Content[0], p))
		}
	}
}

// isEmpty reports whether nothing is between two document marks.
func isEmpty(root *yaml.Node) bool {
	return root.Kind == yaml.ScalarNode && root.Value == "" && root.Style == 0 && root.Anchor == ""
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

func syntaxError(file string, err error) *Error {
	text := err.Error()
	at := yamlLine.FindStringSubmatch(text)
	e := &Error{File: file, Line: 1, Msg: text, Hint: "check indentation, quotes and brackets at this line and around it"}
	if at != nil {
		e.Msg = "not valid YAML: " + strings.TrimPrefix(text, at[0])
		if n, err := strconv.Atoi(at[1]); err == nil {
			e.Line = n
		}
	}
	return e
}

// resource decodes and validates one document by its kind.
func (p *parser) resource(d *document) {
	switch d.kind() {
	case "":
	case KindProtectedService:
		p.services = append(p.services, located[ProtectedService]{d, decoded[ProtectedService](d)})
	case KindBypassPolicy:
		p.policies = append(p.policies, located[BypassPolicy]{d, decoded[BypassPolicy](d)})
	case KindKeyring:
		p.keyrings = append(p.keyrings, located[Keyring]{d, decoded[Keyring](d)})
	case KindDenyList:
		p.denials = append(p.denials, located[DenyList]{d, decoded[DenyList](d)})
	case KindGrantTemplate:
		p.templates = append(p.templates, located[GrantTemplate]{d, decoded[GrantTemplate](d)})
	case KindResourceSet:
		p.sets = append(p.sets, located[ResourceSet]{d, decoded[ResourceSet](d)})
	case KindIdentityProvider:
		p.providers = append(p.providers, located[IdentityProvider]{d, decoded[IdentityProvider](d)})
	case KindRemoteService:
		p.remotes = append(p.remotes, located[RemoteService]{d, decoded[RemoteService](d)})
	case KindRollout:
		p.rollouts = append(p.rollouts, located[Rollout]{d, decoded[Rollout](d)})
	case KindAgentConfig:
		d.report("kind", faultf("keep it in a file of its own and check it with `sallyport-agent check --config FILE`",
			"an AgentConfig is no part of a set of resources"))
	default:
		d.report("kind", faultf("known kinds: "+knownKinds, "kind %q is not known", d.kind()))
	}
}

// kindOfResource is a kind that a set has.
type kindOfResource[T any] interface {
	*T
	validate(*document)
	from(Source)
}

// decoded reads a document and looks at it by itself.
func decoded[T any, P kindOfResource[T]](d *document) T {
	var v T
	d.decode(d.root, reflect.ValueOf(&v).Elem(), "")
	P(&v).from(d.source())
	P(&v).validate(d)
	return v
}

func (s *ProtectedService) from(at Source) { s.Source = at }
func (p *BypassPolicy) from(at Source)     { p.Source = at }
func (k *Keyring) from(at Source)          { k.Source = at }
func (l *DenyList) from(at Source)         { l.Source = at }
func (t *GrantTemplate) from(at Source)    { t.Source = at }
func (r *ResourceSet) from(at Source)      { r.Source = at }
func (p *IdentityProvider) from(at Source) { p.Source = at }

const knownKinds = "ProtectedService, BypassPolicy, Keyring, DenyList, GrantTemplate, ResourceSet, IdentityProvider, RemoteService, Rollout"

// kind reads what the document says it is, and reports if it does not say it rightly.
func (d *document) kind() string {
	if d.root.Kind != yaml.MappingNode {
		d.report("", faultf("begin with apiVersion: "+APIVersion, "want a resource, got %s", kindOf(d.root)))
		return ""
	}
	version, kind := d.lookup("apiVersion"), d.lookup("kind")
	if version != APIVersion {
		d.report("apiVersion", faultf("write apiVersion: "+APIVersion, "version %q is not known", version))
	}
	if kind == "" {
		d.report("kind", faultf("write a kind; known are "+knownKinds, "is missing"))
	}
	return kind
}

// lookup finds a text at the top of the document, and notes its line.
func (d *document) lookup(key string) string {
	for i := 0; i+1 < len(d.root.Content); i += 2 {
		if k, v := d.root.Content[i], d.root.Content[i+1]; k.Value == key && v.Kind == yaml.ScalarNode {
			d.lines[key] = k.Line
			return v.Value
		}
	}
	return ""
}
