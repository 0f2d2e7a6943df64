package token

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4/json" // refuses a key that comes twice, and does not fold case
)

// Bounds of what is looked at.
const (
	maxToken = 16 << 10
	maxKeyID = 256
)

// examined is what a token says before anything of it is proven.
type examined struct {
	algorithm, keyID, kind string // of the header: alg, kid, typ
	issuer, subject        string
	claims                 map[string]any
}

// loaded are header parameters that bring keys along, tell where to fetch them, or change how the rest is read.
var loaded = []string{"crit", "b64", "jku", "jwk", "x5u", "x5c", "enc", "zip"}

// examine takes a token apart: three parts in base64url without padding, and objects in which no key comes twice. Libraries
// are laxer, each in its own way; after this they cannot disagree about what it says.
func examine(raw string) (examined, error) {
	if len(raw) > maxToken {
		return examined{}, fmt.Errorf("%w: longer than %d bytes", ErrMalformed, maxToken)
	}
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return examined{}, fmt.Errorf("%w: has %d parts, not 3", ErrMalformed, len(parts))
	}
	header, err := object(parts[0])
	if err != nil {
		return examined{}, fmt.Errorf("%w: header %v", ErrMalformed, err)
	}
	claims, err := object(parts[1])
	if err != nil {
		return examined{}, fmt.Errorf("%w: payload %v", ErrMalformed, err)
	}
	if _, err := decode(parts[2]); err != nil {
		return examined{}, fmt.Errorf("%w: signature %v", ErrMalformed, err)
	}
	return judgeHeader(header, claims)
}

func judgeHeader(header, claims map[string]any) (t examined, err error) {
	for _, name := range loaded {
		if _, there := header[name]; there {
			return t, fmt.Errorf("%w: header has %s, which is never taken", ErrNotTaken, name)
		}
	}
	t.claims = claims
	for name, to := range map[string]*string{"alg": &t.algorithm, "kid": &t.keyID, "typ": &t.kind} {
		if err := text(header, name, to); err != nil {
			return t, err
		}
	}
	for name, to := range map[string]*string{"iss": &t.issuer, "sub": &t.subject} {
		if err := text(claims, name, to); err != nil {
			return t, err
		}
	}
	if t.algorithm == "" || strings.EqualFold(t.algorithm, "none") || strings.HasPrefix(strings.ToUpper(t.algorithm), "HS") {
		return t, fmt.Errorf("%w: algorithm %s is never taken", ErrNotTaken, quote(t.algorithm))
	}
	if len(t.keyID) > maxKeyID {
		return t, fmt.Errorf("%w: kid is longer than %d bytes", ErrMalformed, maxKeyID)
	}
	return t, nil
}

// text reads a string that may be left out, but not be anything else.
func text(from map[string]any, name string, to *string) error {
	value, there := from[name]
	if !there {
		return nil
	}
	var ok bool
	if *to, ok = value.(string); !ok || *to == "" {
		return fmt.Errorf("%w: %s is no text", ErrMalformed, name)
	}
	return nil
}

func decode(part string) ([]byte, error) {
	data, err := base64.RawURLEncoding.Strict().DecodeString(part)
	if err == nil && (len(data) == 0 || strings.ContainsAny(part, "\r\n")) { // the decoder skips line ends
		return nil, fmt.Errorf("is empty or has line ends")
	}
	return data, err
}

func object(part string) (map[string]any, error) {
	data, err := decode(part)
	if err != nil {
		return nil, err
	}
	if !utf8.Valid(data) {
		return nil, fmt.Errorf("is not UTF-8")
	}
	var o map[string]any
	if err := json.Unmarshal(data, &o); err != nil {
		return nil, fmt.Errorf("is no JSON object: %s", quote(err.Error()))
	}
	if o == nil {
		return nil, fmt.Errorf("is no JSON object")
	}
	return o, nil
}

// quote makes a piece of a token, or of a provider's answer, fit for a log.
func quote(s string) string {
	const most = 300
	if len(s) > most {
		return fmt.Sprintf("%+q...", s[:most])
	}
	return fmt.Sprintf("%+q", s)
}

// ofKind compares a typ as RFC 7515 has it: without case, and with or without application/.
func (t examined) ofKind(kinds ...string) bool {
	return slices.Contains(kinds, strings.TrimPrefix(strings.ToLower(t.kind), "application/"))
}
