package policy

import (
	"encoding"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// decode fills v from the node, strictly: an unknown key, a key given twice, a value of another
// kind, an alias and an explicit tag are all problems. Fields that are not written keep their value.
func (d *document) decode(n *yaml.Node, v reflect.Value, field string) {
	if _, ok := d.lines[field]; !ok {
		d.lines[field] = n.Line
	}
	if err := checkPlain(n); err != nil {
		d.report(field, err)
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	if text, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.report(field, decodeText(n, text))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.decodeStruct(n, v, field)
	case reflect.Slice:
		d.decodeSlice(n, v, field)
	case reflect.Map:
		d.decodeMap(n, v, field)
	default:
		d.report(field, decodeScalar(n, v))
	}
}

// checkPlain refuses what makes one text mean another: aliases, anchors, merge keys, own tags, and
// keys without a value.
func checkPlain(n *yaml.Node) error {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		return faultf("write the value out in full", "anchors and aliases are not allowed")
	case n.Style&yaml.TaggedStyle != 0:
		return faultf("remove the tag", "the tag %s is not allowed", n.Tag)
	case n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null":
		return faultf("give it a value or remove the key", "has no value")
	}
	return nil
}

func (d *document) decodeStruct(n *yaml.Node, v reflect.Value, field string) {
	if n.Kind != yaml.MappingNode {
		d.report(field, faultf("write it as key: value lines", "want a mapping, got %s", kindOf(n)))
		return
	}
	fields := map[string]reflect.Value{}
	collectFields(v, fields)
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		path := join(field, key.Value)
		if err := checkKey(key, fields, seen); err != nil {
			// A wrong key is reported at its own line, without spoiling the field of its name.
			d.problems.add(d.located(path, key.Line, err))
			continue
		}
		seen[key.Value] = key.Line
		d.lines[path] = key.Line
		d.decode(value, fields[key.Value], path)
	}
}

// checkKey takes any key where nobody says which there are.
func checkKey(key *yaml.Node, fields map[string]reflect.Value, seen map[string]int) error {
	if key.Kind != yaml.ScalarNode || key.Style&yaml.TaggedStyle != 0 || key.Anchor != "" {
		return faultf("use plain text as the key", "a key is not plain text")
	}
	if line, ok := seen[key.Value]; ok {
		return faultf("keep one of them", "is given twice, first on line %d", line)
	}
	if _, ok := fields[key.Value]; !ok && fields != nil {
		return faultf(suggest(key.Value, fields), "unknown key")
	}
	return nil
}

// collectFields maps the keys of a struct to its fields, by their yaml tags.
func collectFields(v reflect.Value, into map[string]reflect.Value) {
	for i := range v.NumField() {
		name, options, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
		switch {
		case name == "-":
		case options == "inline":
			collectFields(v.Field(i), into)
		default:
			into[name] = v.Field(i)
		}
	}
}

func (d *document) decodeSlice(n *yaml.Node, v reflect.Value, field string) {
	if n.Kind != yaml.SequenceNode {
		d.report(field, faultf("write it as a list, like [a, b]", "want a list, got %s", kindOf(n)))
		return
	}
	v.SetZero() // an empty list is none, as in the canonical form
	if len(n.Content) == 0 {
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		d.decode(item, v.Index(i), fmt.Sprintf("%s[%d]", field, i))
	}
}

// decodeMap fills a map from text to text.
func (d *document) decodeMap(n *yaml.Node, v reflect.Value, field string) {
	if n.Kind != yaml.MappingNode {
		d.report(field, faultf("write it as key: value lines", "want a mapping, got %s", kindOf(n)))
		return
	}
	v.SetZero() // an empty one is none, as in the canonical form
	if len(n.Content) == 0 {
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		path := join(field, key.Value)
		if err := checkKey(key, nil, seen); err != nil {
			d.problems.add(d.located(path, key.Line, err))
			continue
		}
		seen[key.Value] = key.Line
		item := reflect.New(v.Type().Elem()).Elem()
		d.decode(value, item, path)
		v.SetMapIndex(reflect.ValueOf(key.Value), item)
	}
}

func decodeText(n *yaml.Node, into encoding.TextUnmarshaler) error {
	if n.Kind != yaml.ScalarNode {
		return faultf("write one value, in quotes if it is odd", "want one value, got %s", kindOf(n))
	}
	err := into.UnmarshalText([]byte(n.Value))
	if err == nil {
		return nil
	}
	switch into.(type) {
	case *netip.Addr:
		return faultf("write one address, like 10.2.0.2 or fd00:2::2", "%q is not an IP address", n.Value)
	case *time.Time:
		return faultf("write it like 2027-01-01T00:00:00Z", "%q is not a time", n.Value)
	}
	return err
}

func decodeScalar(n *yaml.Node, v reflect.Value) error {
	switch v.Kind() {
	case reflect.String:
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
			return faultf("put it in quotes if it is meant as text", "want text, got %s", kindOf(n))
		}
		if strings.ContainsFunc(n.Value, unshowable) {
			return faultf("write it in plain text", "has characters that cannot be shown")
		}
		v.SetString(n.Value)
	case reflect.Bool:
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" {
			return faultf("write true or false, without quotes", "want true or false, got %s", kindOf(n))
		}
		v.SetBool(strings.EqualFold(n.Value, "true"))
	default:
		return decodeNumber(n, v)
	}
	return nil
}

// unshowable says that a character is neither seen nor a space, and could make a text look like another.
func unshowable(r rune) bool { return !unicode.IsPrint(r) && r != '\n' && r != '\t' }

// decodeNumber takes decimal digits only, so that no number means another one to another reader.
func decodeNumber(n *yaml.Node, v reflect.Value) error {
	most := uint64(1)<<v.Type().Bits() - 1
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" {
		return faultf("write decimal digits, without quotes", "want a whole number, got %s", kindOf(n))
	}
	value, err := strconv.ParseUint(n.Value, 10, v.Type().Bits())
	if err != nil || n.Value != strconv.FormatUint(value, 10) {
		return faultf("write decimal digits, without quotes", "want a whole number from 0 to %d, got %s", most, n.Value)
	}
	v.SetUint(value)
	return nil
}

func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!int", "!!float":
		return "the number " + n.Value
	case "!!bool":
		return "the truth value " + n.Value
	case "!!timestamp":
		return "the time " + n.Value
	}
	return fmt.Sprintf("the text %q", n.Value)
}

// join makes the path of a key. A key that is no plain word is quoted and cut, for it may be
// anything.
func join(field, key string) string {
	if len(key) > 63 || strings.ContainsFunc(key, notWord) {
		key = strconv.Quote(cut(key))
	}
	if field == "" {
		return key
	}
	return field + "." + key
}

func notWord(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
}
