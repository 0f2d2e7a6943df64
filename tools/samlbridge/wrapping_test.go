package main

import (
	"encoding/base64"
	"net/url"
	"strings"
	"testing"

	"github.com/beevik/etree"
)

// document is a response that a test takes apart.
type document struct {
	t *testing.T
	*etree.Document
}

func open(t *testing.T, values url.Values) document {
	t.Helper()
	text, err := base64.StdEncoding.DecodeString(values.Get("SAMLResponse"))
	if err != nil {
		t.Fatal(err)
	}
	d := document{t, etree.NewDocument()}
	if err := d.ReadFromBytes(text); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d document) text() string {
	d.t.Helper()
	text, err := d.WriteToString()
	if err != nil {
		d.t.Fatal(err)
	}
	return text
}

func (d document) assertion() *etree.Element { return d.Root().FindElement("./Assertion") }

// bare is a copy without its own signature.
func bare(e *etree.Element) *etree.Element {
	c := e.Copy()
	if s := c.SelectElement("Signature"); s != nil {
		c.RemoveChild(s)
	}
	return c
}

// evil is a copy that says that it is about somebody else, under an ID of its own.
func evil(e *etree.Element) *etree.Element {
	c := e.Copy()
	c.CreateAttr("ID", "id-evil")
	c.FindElement(".//NameID").SetText("admin@example.org")
	return c
}

// alone takes the response's signature out, so that the assertion's is the only one: many identity providers sign no more.
func (d document) alone() document {
	d.Root().RemoveChild(d.Root().SelectElement("Signature"))
	return d
}

// wrappings are the eight known ways to have the signature checked on one element, and another read. 1 and 2 are for signed
// responses, the others for signed assertions.
var wrappings = map[string]func(document){
	"XSW1": func(d document) { // the signed response inside the signature of the evil one
		original := bare(d.Root())
		forged := evil(d.Root())
		forged.SelectElement("Signature").AddChild(original)
		d.SetRoot(forged)
	},
	"XSW2": func(d document) { // the signed response before the signature of the evil one
		original := bare(d.Root())
		forged := evil(d.Root())
		forged.InsertChildAt(forged.SelectElement("Signature").Index(), original)
		d.SetRoot(forged)
	},
	"XSW3": func(d document) { // an evil assertion before the signed one
		d.alone().Root().InsertChildAt(d.assertion().Index(), evil(bare(d.assertion())))
	},
	"XSW4": func(d document) { // the signed assertion inside the evil one
		signed := d.alone().assertion()
		forged := evil(bare(signed))
		d.Root().RemoveChild(signed)
		forged.AddChild(signed)
		d.Root().AddChild(forged)
	},
	"XSW5": func(d document) { // the evil one has the signature, the signed one is at the end
		signed := d.alone().assertion()
		forged := evil(signed)
		original := bare(signed)
		d.Root().RemoveChild(signed)
		d.Root().AddChild(forged)
		d.Root().AddChild(original)
	},
	"XSW6": func(d document) { // the signed one inside the signature of the evil one
		signed := d.alone().assertion()
		forged := evil(signed)
		forged.SelectElement("Signature").AddChild(bare(signed))
		d.Root().RemoveChild(signed)
		d.Root().AddChild(forged)
	},
	"XSW7": func(d document) { // the evil one in an extension
		signed := d.alone().assertion()
		extensions := etree.NewElement("samlp:Extensions")
		extensions.AddChild(evil(bare(signed)))
		d.Root().InsertChildAt(signed.Index(), extensions)
	},
	"XSW8": func(d document) { // the signed one in an object of the signature of the evil one
		signed := d.alone().assertion()
		forged := evil(signed)
		object := etree.NewElement("ds:Object")
		object.AddChild(bare(signed))
		forged.SelectElement("Signature").AddChild(object)
		d.Root().RemoveChild(signed)
		d.Root().AddChild(forged)
	},
	"same ID": func(d document) { // two elements that the signature's reference can mean
		signed := d.alone().assertion()
		extensions := etree.NewElement("samlp:Extensions")
		extensions.CreateAttr("ID", signed.SelectAttrValue("ID", ""))
		extensions.AddChild(evil(bare(signed)).FindElement(".//Subject"))
		d.Root().InsertChildAt(signed.Index(), extensions)
	},
	"no assertion of the response": func(d document) { // the only assertion is deeper than readers look
		signed := d.alone().assertion()
		extensions := etree.NewElement("samlp:Extensions")
		d.Root().RemoveChild(signed)
		extensions.AddChild(signed)
		d.Root().AddChild(extensions)
	},
}

// signatureWrapping: each is refused by its shape alone, before a signature is looked at, and by the whole.
func signatureWrapping(t *testing.T, w *world) {
	b := w.browser()
	for name, wrap := range wrappings {
		where, _ := w.begin()
		values := b.assertion("mallory", where)
		d := open(t, values)
		if err := single([]byte(d.text())); err != nil {
			t.Fatalf("the response as it came: %v", err)
		}
		wrap(d)
		text := d.text()
		if name != "no assertion of the response" && !strings.Contains(text, "admin@example.org") {
			t.Fatalf("%s: it names no admin: %s", name, text)
		}
		if single([]byte(text)) == nil {
			t.Errorf("%s: its shape is taken", name)
		}
		values.Set("SAMLResponse", base64.StdEncoding.EncodeToString([]byte(text)))
		if b.bring(values) != "" {
			t.Errorf("%s: it is taken", name)
		}
	}
}

// signatures: what is signed is what counts, and only by the identity provider.
func signatures(t *testing.T, w *world) {
	other := newWorld(t)
	b := w.browser()
	for name, c := range map[string]struct {
		change func(string) string
		taken  bool
	}{
		"as it came":              {func(s string) string { return s }, true},
		"another name":            {func(s string) string { return strings.Replace(s, "ann@example.org", "admin@example.org", 1) }, false},
		"another group":           {func(s string) string { return strings.Replace(s, ">staff<", ">admins<", 1) }, false},
		"a comment in the name":   {func(s string) string { return strings.ReplaceAll(s, "ann@example.org", "ann@example.org<!-- -->") }, false},
		"a name split by comment": {func(s string) string { return strings.ReplaceAll(s, "ann@example.org", "ann<!-- x -->@example.org") }, false},
		"CDATA":                   {func(s string) string { return strings.ReplaceAll(s, "ann@example.org", "<![CDATA[ann@example.org]]>") }, false},
		"document type":           {func(s string) string { return `<!DOCTYPE x [<!ENTITY who "admin">]>` + s }, false},
		"instruction":             {func(s string) string { return strings.Replace(s, "ann@", "<?x y?>ann@", 1) }, false},
		"no XML":                  {func(string) string { return "hello" }, false},
		"nothing":                 {func(string) string { return "" }, false},
		"too long":                {func(s string) string { return s + strings.Repeat(" ", maxResponse) }, false},
	} {
		where, _ := w.begin()
		values := b.assertion("ann", where)
		text := c.change(open(t, values).text())
		values.Set("SAMLResponse", base64.StdEncoding.EncodeToString([]byte(text)))
		if taken := b.bring(values) != ""; taken != c.taken {
			t.Errorf("%s: taken: %v\n%s", name, taken, w.log())
		}
	}
	for name, change := range map[string]func(document){
		"only the assertion is signed":        func(d document) { d.alone() },
		"the assertion's signature taken out": func(d document) { d.assertion().RemoveChild(d.assertion().SelectElement("Signature")) },
		"nothing is signed": func(d document) {
			d.alone().assertion().RemoveChild(d.assertion().SelectElement("Signature"))
		},
		"signed by somebody else": func(d document) {
			foreign := other.browser()
			where, _ := other.begin()
			*d.Document = *open(t, foreign.assertion("ann", where)).Document
		},
	} {
		where, _ := w.begin()
		values := b.assertion("ann", where)
		d := open(t, values)
		change(d)
		values.Set("SAMLResponse", base64.StdEncoding.EncodeToString([]byte(d.text())))
		want := name == "only the assertion is signed"
		if taken := b.bring(values) != ""; taken != want {
			t.Errorf("%s: taken: %v\n%s", name, taken, w.log())
		}
	}
}
