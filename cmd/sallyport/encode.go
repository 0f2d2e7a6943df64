package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
)

// encodeJSON gives one line of JSON in which every character prints as itself.
func encodeJSON(value any) ([]byte, error) {
	data, err := rawJSON(value)
	if err != nil {
		return nil, err
	}
	return append(escapeQuoted(bytes.TrimSpace(data), jsonEscape), '\n'), nil
}

// encodeYAML gives one YAML document with the fields of the JSON form, in the same order.
func encodeYAML(value any) ([]byte, error) {
	data, err := rawJSON(value)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	node, err := yamlNode(d)
	if err != nil {
		return nil, err
	}
	b := bytes.NewBufferString("---\n")
	e := yaml.NewEncoder(b)
	e.SetIndent(2)
	if err := e.Encode(node); err != nil {
		return nil, err
	}
	return escapeQuoted(b.Bytes(), yamlEscape), nil
}

func rawJSON(value any) ([]byte, error) {
	if m, ok := value.(proto.Message); ok {
		value = plain(m)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(value)
	return b.Bytes(), err
}

// escapeQuoted escapes what the encoders leave as it is and a terminal may act on. Such
// characters can only stand inside double quotes, where the escapes mean the same.
func escapeQuoted(data []byte, form func(rune) string) []byte {
	var b strings.Builder
	for _, r := range string(data) {
		if r == '\n' || !unprintable(r) {
			b.WriteRune(r)
			continue
		}
		b.WriteString(form(r))
	}
	return []byte(b.String())
}

func jsonEscape(r rune) string {
	if r <= 0xffff {
		return fmt.Sprintf(`\u%04x`, r)
	}
	r -= 0x10000
	return fmt.Sprintf(`\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
}

func yamlEscape(r rune) string { return fmt.Sprintf(`\U%08x`, r) }

// yamlNode reads the next JSON value; a map of Go's would lose the order of the fields.
func yamlNode(d *json.Decoder) (*yaml.Node, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch v := token.(type) {
	case json.Delim:
		return yamlContent(d, v)
	case string:
		return yamlString(v), nil
	case json.Number:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: v.String()}, nil
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: fmt.Sprint(v)}, nil
	}
	return &yaml.Node{Kind: yaml.ScalarNode, Value: "null"}, nil
}

func yamlContent(d *json.Decoder, open json.Delim) (*yaml.Node, error) {
	node := &yaml.Node{Kind: yaml.MappingNode}
	if open == '[' {
		node.Kind = yaml.SequenceNode
	}
	for d.More() {
		child, err := yamlNode(d) // in an object: a key or its value
		if err != nil {
			return nil, err
		}
		node.Content = append(node.Content, child)
	}
	_, err := d.Token()
	return node, err
}

func yamlString(s string) *yaml.Node {
	node := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s}
	if strings.IndexFunc(s, unprintable) >= 0 {
		node.Style = yaml.DoubleQuotedStyle
	}
	return node
}
