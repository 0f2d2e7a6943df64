// Package schema says of a resource what an API server with our definitions would, without one.
package schema

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crd "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	structural "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/validation/field"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Definitions are those of every kind.
type Definitions map[string]*Definition

// Definition is that of one kind.
type Definition struct {
	structural *structural.Structural
	schema     validation.SchemaValidator
	rules      *cel.Validator
}

// Load reads the definitions of a folder. They must be such as an API server takes: structural, and with rules within its budgets.
func Load(t testing.TB, folder string) Definitions {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no definitions in %s: %v", folder, err)
	}
	all := Definitions{}
	for _, file := range files {
		kind, d, err := load(file)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		all[kind] = d
	}
	return all
}

func load(file string) (kind string, d *Definition, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", nil, err
	}
	var outer apiextensionsv1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(text, &outer); err != nil {
		return "", nil, err
	}
	apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&outer.Spec)
	outer.Status.StoredVersions = []string{outer.Spec.Versions[0].Name} // as the API server does
	var inner apiextensions.CustomResourceDefinition
	if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(&outer, &inner, nil); err != nil {
		return "", nil, err
	}
	if errs := crd.ValidateCustomResourceDefinition(context.Background(), &inner); len(errs) > 0 {
		return "", nil, errs.ToAggregate()
	}
	props, err := apiextensions.GetSchemaForVersion(&inner, outer.Spec.Versions[0].Name)
	if err != nil {
		return "", nil, err
	}
	d = &Definition{}
	if d.structural, err = structural.NewStructural(props.OpenAPIV3Schema); err != nil {
		return "", nil, err
	}
	if d.schema, _, err = validation.NewSchemaValidator(props.OpenAPIV3Schema); err != nil {
		return "", nil, err
	}
	d.rules = cel.NewValidator(d.structural, true, math.MaxInt64)
	return inner.Spec.Names.Kind, d, nil
}

// Objects are the documents of a file, read as strictly as kubectl does.
func Objects(text []byte) (all []map[string]any, err error) {
	for d := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text))); ; {
		buffer := make([]byte, len(text)+1)
		n, err := d.Read(buffer)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		data, err := yaml.YAMLToJSONStrict(buffer[:n])
		if err != nil {
			return nil, err
		}
		var v any
		if err := json.Unmarshal(data, &v); err != nil {
			return nil, err
		}
		switch v := v.(type) {
		case nil: // nothing between two marks
		case map[string]any:
			all = append(all, v)
		default:
			return nil, fmt.Errorf("want a resource, got %T", v)
		}
	}
}

// Refusals are what is wrong with an object that is new, or, where there is an old one, with the change. The object gets its defaults.
func (all Definitions) Refusals(object, old map[string]any) (errs field.ErrorList) {
	kind, _ := object["kind"].(string)
	d := all[kind]
	if version := object["apiVersion"]; d == nil || version != "sallyport.dev/v1alpha1" {
		return field.ErrorList{field.NotFound(field.NewPath("kind"), fmt.Sprint(version, " ", kind))}
	}
	errs = metadata(object["metadata"])
	for _, path := range pruning.PruneWithOptions(object, d.structural, true, structural.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}) {
		errs = append(errs, field.Invalid(field.NewPath(path), nil, "unknown field"))
	}
	defaulting.PruneNonNullableNullsWithoutDefaults(object, d.structural)
	defaulting.Default(object, d.structural)
	errs = append(errs, validation.ValidateCustomResource(nil, object, d.schema)...)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, d.structural, object)...)
	for _, e := range errs { // rules are not asked about what is not of the form that they are for
		switch e.Type {
		case field.ErrorTypeRequired, field.ErrorTypeTooLong, field.ErrorTypeTooMany, field.ErrorTypeTypeInvalid:
			return errs
		}
	}
	var before any
	if old != nil {
		before = old
	}
	more, _ := d.rules.Validate(context.Background(), nil, d.structural, object, before, math.MaxInt64)
	return append(errs, more...)
}

// metadata looks for what no metadata has.
func metadata(of any) (errs field.ErrorList) {
	fields, _ := of.(map[string]any)
	for name := range fields {
		switch name {
		case "name", "labels", "annotations", "generation", "resourceVersion", "uid":
		default:
			errs = append(errs, field.Invalid(field.NewPath("metadata", name), nil, "unknown field"))
		}
	}
	if name, _ := fields["name"].(string); name == "" {
		errs = append(errs, field.Required(field.NewPath("metadata", "name"), "name or generateName is required"))
	}
	return errs
}
