package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// object is a message for machines to read: its fields by their names in the API, in their
// order, numbers as numbers, times in RFC 3339, durations in Go's form ("1m30s"). A field is
// left out only if it is a message, or a time, that is not there.
type object []member

type member struct {
	name  string
	value any
}

// MarshalJSON keeps the order of the fields.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		name, _ := json.Marshal(m.name)
		value, err := json.Marshal(m.value)
		if err != nil {
			return nil, err
		}
		b.Write(name)
		b.WriteByte(':')
		b.Write(value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

func plain(m proto.Message) object { return plainMessage(m.ProtoReflect()) }

func plainMessage(m protoreflect.Message) object {
	o := object{}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.HasPresence() && !m.Has(f) {
			continue
		}
		o = append(o, member{string(f.Name()), plainField(f, m.Get(f))})
	}
	return o
}

func plainField(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch {
	case f.IsMap():
		return plainMap(f, v.Map())
	case f.IsList():
		list := make([]any, v.List().Len())
		for i := range list {
			list[i] = plainValue(f, v.List().Get(i))
		}
		return list
	}
	return plainValue(f, v)
}

func plainMap(f protoreflect.FieldDescriptor, v protoreflect.Map) object {
	values := map[string]any{}
	v.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		values[k.String()] = plainValue(f.MapValue(), v)
		return true
	})
	o := object{}
	for _, k := range slices.Sorted(maps.Keys(values)) {
		o = append(o, member{k, values[k]})
	}
	return o
}

func plainValue(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch f.Kind() {
	case protoreflect.EnumKind:
		if e := f.Enum().Values().ByNumber(v.Enum()); e != nil {
			return string(e.Name())
		}
		return int32(v.Enum())
	case protoreflect.MessageKind:
		switch m := v.Message().Interface().(type) {
		case *timestamppb.Timestamp:
			return m.AsTime().Format(time.RFC3339Nano)
		case *durationpb.Duration:
			return m.AsDuration().String()
		}
		return plainMessage(v.Message())
	}
	return v.Interface()
}
