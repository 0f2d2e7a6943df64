package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func signES256(key *ecdsa.PrivateKey, input string) (string, error) {
	digest := sha256.Sum256([]byte(input))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return "", err
	}
	raw := make([]byte, 64)
	r.FillBytes(raw[:32])
	s.FillBytes(raw[32:])
	return base64.RawURLEncoding.EncodeToString(raw), nil
}

// TestHostileTokens is the table of docs/attacks.md: what is signed by the right key, or would like to be, and must prove
// nobody, beside what differs from it as little as may be and does.
func TestHostileTokens(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	i.change(func() {
		i.keys = append(i.keys, jose.JSONWebKey{Key: rsaKey.Public(), KeyID: "rsa", Use: "sig"},
			jose.JSONWebKey{Key: newKey(t).Public(), KeyID: "two", Use: "sig"},
			jose.JSONWebKey{Key: newKey(t).Public(), KeyID: "for encryption", Use: "enc"})
	})
	v := newVerifying(t, nil, i.provider())
	now := time.Now().Unix()
	header, claims := i.good()
	with := func(change fields) string { return i.mint(nil, change) }
	as := func(change fields) string { return i.mint(change, nil) }
	// text signs a payload as it is written.
	text := func(payload string) string { return i.sign(header.part(t) + "." + encode(payload)) }
	good := i.mint(nil, nil)
	parts := strings.Split(good, ".")

	for name, c := range map[string]struct {
		token string
		want  error
	}{
		"good":                           {good, nil},
		"good of a typ in full":          {as(fields{"typ": "application/AT+JWT"}), nil},
		"good without typ":               {as(fields{"typ": nil}), nil},
		"good with a key's thumbprint":   {as(fields{"x5t": "abc"}), nil},
		"good for several":               {with(fields{"aud": []string{"other", audience}, "azp": "client"}), nil},
		"good without groups":            {with(fields{"groups": nil}), nil},
		"good within the skew":           {with(fields{"exp": now - 10, "nbf": now + 10, "iat": now + 10}), nil},
		"good with fractions of seconds": {with(fields{"exp": float64(now) + 99.5}), nil},

		"no token":                     {"", ErrMalformed},
		"two parts":                    {parts[0] + "." + parts[1], ErrMalformed},
		"no signature":                 {parts[0] + "." + parts[1] + ".", ErrMalformed},
		"five parts":                   {good + ".a.b", ErrMalformed},
		"padded":                       {good + "==", ErrMalformed},
		"plain base64":                 {parts[0] + "." + parts[1] + "." + strings.Repeat("+/", 43), ErrMalformed},
		"a line end":                   {parts[0] + "." + parts[1] + ".\n" + parts[2], ErrMalformed},
		"a space before":               {" " + good, ErrMalformed},
		"stray bits at the end":        {strayBits(good), ErrMalformed},
		"as JSON":                      {`{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`, ErrMalformed},
		"too long":                     {with(fields{"x": strings.Repeat("x", maxToken)}), ErrMalformed},
		"not UTF-8":                    {text("{\"sub\":\"\xff\"}"), ErrMalformed},
		"no object":                    {text(`["alice"]`), ErrMalformed},
		"null":                         {text(`null`), ErrMalformed},
		"two objects":                  {text(`{}{}`), ErrMalformed},
		"nested deep":                  {text(strings.Repeat(`{"a":`, 2000)), ErrMalformed},
		"a claim twice":                {text(strings.TrimSuffix(decoded(claims.part(t)), "}") + `,"sub":"root"}`), ErrMalformed},
		"a claim twice, deeper":        {text(strings.TrimSuffix(decoded(claims.part(t)), "}") + `,"a":{"b":1,"b":2}}`), ErrMalformed},
		"a claim twice, once escaped":  {text(strings.TrimSuffix(decoded(claims.part(t)), "}") + `,"\u0073ub":"root"}`), ErrMalformed},
		"a header twice":               {i.sign(encode(`{"alg":"ES256","alg":"none","kid":"one"}`) + "." + claims.part(t)), ErrMalformed},
		"claims in other case alone":   {with(fields{"sub": nil, "SUB": "alice"}), ErrMalformed},
		"an algorithm that is no text": {as(fields{"alg": 5}), ErrMalformed},

		"none":                              {encode(`{"alg":"none"}`) + "." + claims.part(t) + ".YQ", ErrNotTaken},
		"none without a signature":          {encode(`{"alg":"none"}`) + "." + claims.part(t) + ".", ErrMalformed},
		"nOnE":                              {encode(`{"alg":"nOnE"}`) + "." + claims.part(t) + ".YQ", ErrNotTaken},
		"no algorithm":                      {as(fields{"alg": nil}), ErrNotTaken},
		"HS256 with the public key":         {hs256(t, rsaKey.Public(), fields{"alg": "HS256", "kid": "rsa"}, claims), ErrNotTaken},
		"an algorithm that is not listed":   {as(fields{"alg": "ES384"}), ErrNotTaken},
		"another algorithm than the key's":  {as(fields{"alg": "RS256"}), ErrSignature},
		"another key of the set":            {as(fields{"kid": "two"}), ErrSignature},
		"a key for encryption":              {as(fields{"kid": "for encryption"}), ErrSignature},
		"an unknown key":                    {as(fields{"kid": "three"}), ErrSignature},
		"no kid where several keys fit":     {as(fields{"kid": nil}), ErrSignature},
		"a kid that is a path":              {as(fields{"kid": "../../../dev/null"}), ErrSignature},
		"a kid that is a query":             {as(fields{"kid": "x' UNION SELECT 'one"}), ErrSignature},
		"a kid that is a command":           {as(fields{"kid": "one|id"}), ErrSignature},
		"a kid that is a number":            {as(fields{"kid": 1}), ErrMalformed},
		"a long kid":                        {as(fields{"kid": strings.Repeat("k", 300)}), ErrMalformed},
		"where to fetch the key":            {as(fields{"jku": "https://evil.example/keys"}), ErrNotTaken},
		"where to fetch the certificate":    {as(fields{"x5u": "https://evil.example/cert"}), ErrNotTaken},
		"its own key":                       {ownKey(t, claims), ErrNotTaken},
		"its own certificate":               {as(fields{"x5c": []string{"MIIB"}}), ErrNotTaken},
		"a critical extension":              {as(fields{"crit": []string{"b64"}, "b64": false}), ErrNotTaken},
		"compressed":                        {as(fields{"zip": "DEF"}), ErrNotTaken},
		"another type":                      {as(fields{"typ": "logout+jwt"}), ErrNotTaken},
		"signed by a stranger":              {signedBy(t, header, claims), ErrSignature},
		"another payload":                   {parts[0] + "." + claims.with(fields{"sub": "root"}).part(t) + "." + parts[2], ErrSignature},
		"another header":                    {header.with(fields{"x": 1}).part(t) + "." + parts[1] + "." + parts[2], ErrSignature},
		"a signature of zeros":              {parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(make([]byte, 64)), ErrSignature},
		"a signature in ASN.1":              {asn1Signed(t, i.key, header, claims), ErrSignature},
		"another issuer":                    {with(fields{"iss": "https://evil.example"}), ErrNotTaken},
		"an issuer that differs by a slash": {with(fields{"iss": i.URL + "/"}), ErrNotTaken},
		"issuer in two cases":               {with(fields{"iss": "https://evil.example", "ISS": i.URL}), ErrNotTaken},
		"issuers as a list":                 {with(fields{"iss": []string{i.URL}}), ErrMalformed},
		"for somebody else":                 {with(fields{"aud": "https://other.example.org"}), ErrNotTaken},
		"for a prefix":                      {with(fields{"aud": audience + "/admin"}), ErrNotTaken},
		"for nobody":                        {with(fields{"aud": nil}), ErrMalformed},
		"for an empty list":                 {with(fields{"aud": []string{}}), ErrNotTaken},
		"for an object":                     {with(fields{"aud": fields{audience: true}}), ErrMalformed},
		"for too many":                      {with(fields{"aud": append(make([]string, maxAudiences), audience)}), ErrMalformed},
		"an ID token of the web client":     {i.mint(fields{"typ": "JWT"}, fields{"aud": "web", "nonce": "n"}), ErrNotTaken},

		"expired":                       {with(fields{"exp": now - 31}), ErrTime},
		"without end":                   {with(fields{"exp": nil}), ErrMalformed},
		"an end that is text":           {with(fields{"exp": "9999999999"}), ErrMalformed},
		"an end beyond time":            {with(fields{"exp": 1e300}), ErrMalformed},
		"an end before time":            {with(fields{"exp": -1}), ErrMalformed},
		"not yet":                       {with(fields{"nbf": now + 60}), ErrTime},
		"issued later":                  {with(fields{"iat": now + 60}), ErrTime},
		"a beginning that is text":      {with(fields{"nbf": "soon"}), ErrMalformed},
		"no subject":                    {with(fields{"sub": nil}), ErrMalformed},
		"an empty subject":              {with(fields{"sub": ""}), ErrMalformed},
		"a long subject":                {with(fields{"sub": strings.Repeat("a", 256)}), ErrMalformed},
		"a subject of two lines":        {with(fields{"sub": "alice\nroot"}), ErrMalformed},
		"a subject with a NUL":          {with(fields{"sub": "alice\x00"}), ErrMalformed},
		"a subject that turns the line": {with(fields{"sub": "alice\u202etoor"}), ErrMalformed},
		"a subject of half a pair":      {text(strings.Replace(decoded(claims.part(t)), "alice", `\ud800`, 1)), ErrMalformed},
		"a subject that is a list":      {with(fields{"sub": []string{"alice"}}), ErrMalformed},
		"groups as an object":           {with(fields{"groups": fields{"ops": true}}), ErrMalformed},
		"a group that is a number":      {with(fields{"groups": []any{"ops", 0}}), ErrMalformed},
		"a group of two lines":          {with(fields{"groups": []string{"ops\ndev"}}), ErrMalformed},
		"too many groups":               {with(fields{"groups": make([]string, maxGroups+1)}), ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := v.Verify(t.Context(), orders(policy.AuthenticateOIDC), c.token)
			if !errors.Is(err, c.want) {
				t.Errorf("Verify: %v, want %v", err, c.want)
			}
			if c.want != nil && (got.Caller.String() != "" || !got.Expires.IsZero()) || c.want == nil && got.Caller.String() != "corp/alice" {
				t.Errorf("proves %+v", got)
			}
		})
	}
}

func decoded(part string) string {
	data, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		panic(err)
	}
	return string(data)
}

// strayBits changes the last character into another one that most decoders read the same bytes from.
func strayBits(token string) string {
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(digits, token[len(token)-1])
	return token[:len(token)-1] + string(digits[last|1])
}

// hs256 is the old trick: the public key as the secret of a MAC.
func hs256(t *testing.T, key crypto.PublicKey, header, claims fields) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	input := header.part(t) + "." + claims.part(t)
	mac := hmac.New(sha256.New, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	mac.Write([]byte(input))
	return input + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// ownKey brings the key along that it is signed with.
func ownKey(t *testing.T, claims fields) string {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	input := fields{"alg": "EdDSA", "jwk": jose.JSONWebKey{Key: public}}.part(t) + "." + claims.part(t)
	return input + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(private, []byte(input)))
}

func signedBy(t *testing.T, header, claims fields) string {
	t.Helper()
	input := header.part(t) + "." + claims.part(t)
	signature, err := signES256(newKey(t), input)
	if err != nil {
		t.Fatal(err)
	}
	return input + "." + signature
}

func asn1Signed(t *testing.T, key *ecdsa.PrivateKey, header, claims fields) string {
	t.Helper()
	input := header.part(t) + "." + claims.part(t)
	digest := sha256.Sum256([]byte(input))
	raw, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return input + "." + base64.RawURLEncoding.EncodeToString(raw)
}
