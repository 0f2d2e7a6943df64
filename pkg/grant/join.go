package grant

import (
	"bytes"
	"errors"
	"reflect"
	"slices"
	"strings"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

const joinHint = "join copies of one request: `sallyport grant show FILE` says what each is"

// Join gives an envelope with the signatures of both, those of envelope first, over the payload that both must have. A key
// that has signed both counts once, by its signature in envelope. ErrMalformed: they have different payloads, and each
// field in which they differ is named; or they have more signatures than there is room for. Nobody's signature is verified.
func Join(envelope, other []byte) ([]byte, error) {
	env, body, err := open(envelope)
	if err != nil {
		return nil, err
	}
	more, otherBody, err := open(other)
	if err != nil {
		return nil, err
	}
	if err := samePayload(body, otherBody); err != nil {
		return nil, err
	}
	for _, s := range more.Signatures {
		if !slices.ContainsFunc(env.Signatures, func(o dsse.Signature) bool { return o.KeyID == s.KeyID }) {
			env.Signatures = append(env.Signatures, s)
		}
	}
	if n := len(env.Signatures); n > maxSignatures {
		return nil, refuse("signatures", ErrMalformed, "join fewer of them", "would have %d signatures, the most is %d", n, maxSignatures)
	}
	return encode(env)
}

// samePayload names each field in which two payloads differ.
func samePayload(body, other []byte) error {
	for _, b := range [][]byte{body, other} {
		if _, err := parsePayload(b); err != nil {
			return err
		}
	}
	if bytes.Equal(body, other) {
		return nil
	}
	var a, b wire
	if err := errors.Join(decodeStrict("payload", body, &a), decodeStrict("payload", other, &b)); err != nil {
		return err
	}
	var errs []error
	was, is := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range was.NumField() {
		x, y := was.Field(i).Interface(), is.Field(i).Interface()
		if !reflect.DeepEqual(x, y) {
			name, _, _ := strings.Cut(was.Type().Field(i).Tag.Get("json"), ",")
			errs = append(errs, refuse(name, ErrMalformed, joinHint, "is %.100s, and %.100s in what it is joined with", inJSON(y), inJSON(x)))
		}
	}
	return errors.Join(errs...)
}

func inJSON(v any) []byte {
	text, err := encode(v)
	if err != nil {
		return nil
	}
	return text
}
