package policy_test

import (
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

var wrongWebs = []wrong{
	{"unknown proof", "[spiffe, jwt, oidc]", "[spiffe, jwt, oidc, basic]", "authenticate", "spec.http.authenticate[3]", `"basic" is no way`},
	{"proof twice", "[spiffe, jwt, oidc]", "[spiffe, jwt, oidc, jwt]", "authenticate", "spec.http.authenticate[3]", "already"},
	{"JWT for nobody", `    audiences: ["https://web.example.org"]` + "\n    providers", "    providers", "http:\n", "spec.http.audiences", "at least one"},
	{"audiences without JWT", "[spiffe, jwt, oidc]", "[spiffe, oidc]", "audiences: [\"https://web.example.org\"]\n    prov", "spec.http.audiences", "takes no tokens"},
	{"unknown provider", "providers: [corp]", "providers: [corp, crop]", "providers: [", "spec.http.providers[1]", "no IdentityProvider"},
	{"login elsewhere", "login: corp\n", "login: other\n", "login: other", "spec.http.login", "not in spec.http.providers"},
	{"login without one", ", scopes: [email], session: 4h, idle: 30m}", "}", "", "", ""},
	{"certificate", "certificate: web", "certificate: Web", "certificate: Web", "spec.http.certificate", "not a DNS label"},
	{"host with port", "hosts: [web.example.org,", `hosts: [web.example.org, "a.example.org:80",`, "hosts: [web", "spec.http.hosts[1]", "is not the name of a host"},
	{"host in capitals", "hosts: [web.example.org,", `hosts: [web.example.org, A.example.org,`, "hosts: [web", "spec.http.hosts[1]", "is not the name of a host"},
	{"upstream of no name", "serverName: backend.example.org", `serverName: ""`, "upstream", "spec.http.upstream.tls.serverName", "not the name of a host"},
	{"upstream of no CA", "serverName: backend.example.org", `serverName: a, ca: "x"`, "upstream", "spec.http.upstream.tls.ca", "no certificate in PEM"},
	{"h2c over TLS", "upstream: {", "upstream: {h2c: true, ", "upstream", "spec.http.upstream.h2c", "plaintext"},
	{"small header", "headerBytes: 16KiB", "headerBytes: 16B", "limits", "spec.http.limits.headerBytes", "is not from 1KiB"},
	{"no time for a header", "headerTimeout: 5s", "headerTimeout: 1ms", "limits", "spec.http.limits.headerTimeout", "is not from"},
	{"endless body", "bodyTimeout: 10s", "bodyTimeout: 11m", "limits", "spec.http.limits.bodyTimeout", "is not from"},
	{"too many streams", "streams: 50", "streams: 10001", "limits", "spec.http.limits.streams", "is not from 1 to 10000"},

	{"rule for nobody", `    - identities: ["spiffe://example.org/app/web"]` + "\n      routes", "    - routes", "- routes", "spec.access[0].identities", "lets nobody in"},
	{"identity that nobody proves", "[spiffe, jwt, oidc]\n    audiences: [\"https://web.example.org\"]", "[oidc]", "- identities", "spec.access[0].identities", "nobody proves a SPIFFE ID"},
	{"subject without provider", `"corp/alice"`, `"alice"`, "- subjects", "spec.access[2].subjects[0]", "names nobody"},
	{"subject of a pattern", `"corp/alice"`, `"corp/ali*"`, "- subjects", "spec.access[2].subjects[0]", "has a *"},
	{"every group", "corp/admins", `"corp/*"`, "- groups", "spec.access[1].groups[0]", "has a *"},
	{"group of another provider", "corp/admins", "other/admins", "- groups", "spec.access[1].groups[0]", "not in spec.http.providers"},
	{"range with host bits", "10.1.0.0/24", "10.1.0.1/24", "from: [", "spec.access[1].from[0]", "beyond its prefix"},
	{"window", "days: [Mon]", "days: [Monday]", "during", "spec.access[1].during[0].days[0]", "not a day"},
	{"condition", "claims.mfa == true", "claim.mfa == true", "when", "spec.access[1].when", "undeclared reference"},
	{"condition of a text", `claims.mfa == true && path.startsWith("/admin/")`, "path", "when", "spec.access[1].when", "gives string"},
	{"built-in signal", "source: posture, required", "source: firstSeen, required", "signals", "spec.access[1].signals[0].source", "is about grants"},
	{"signal twice", "source: incident", "source: posture", "signals", "spec.access[1].signals[1].source", "already"},
	{"empty route", "- {methods: [GET, HEAD], paths: [/public/*, /health]}", "- {}", "- {}", "spec.access[0].routes[0]", "says nothing"},
	{"method in small letters", "[GET, HEAD]", "[get, HEAD]", "- {methods: [get", "spec.access[0].routes[0].methods[0]", "no method"},
	{"tunnel", "[GET, HEAD]", "[CONNECT]", "- {methods: [CONN", "spec.access[0].routes[0].methods[0]", "no method"},
	{"path with dots", "/public/*", "/public/../*", "- {methods: [GET", "spec.access[0].routes[0].paths[0]", "not as requests are judged"},
	{"path with an escape", "/health]", "/he%61lth]", "- {methods: [GET", "spec.access[0].routes[0].paths[1]", "not as requests are judged"},
	{"path with an escaped slash", "/health]", "/a%2fb]", "- {methods: [GET", "spec.access[0].routes[0].paths[1]", "in different ways"},
	{"path of a pattern", "/health]", "/h*]", "- {methods: [GET", "spec.access[0].routes[0].paths[1]", "not a last segment"},
	{"relative path", "/health]", "health]", "- {methods: [GET", "spec.access[0].routes[0].paths[1]", "does not begin with /"},
	{"host that is not served", "hosts: [web.example.org], headers", "hosts: [a.example.org], headers", "- {methods: [POST", "spec.access[0].routes[1].hosts[0]", "not in spec.http.hosts"},
	{"header in capitals", "x-team: blue", "X-Team: blue", "- {methods: [POST", "spec.access[0].routes[1].headers", "not the name of a header"},
	{"header host", "x-team: blue", "host: blue", "- {methods: [POST", "spec.access[0].routes[1].headers", "no header to compare"},
	{"header twice", "x-team: blue", "x-team: blue, x-team: red", "- {methods: [POST", "spec.access[0].routes[1].headers.x-team", "given twice"},
	{"header that is a list", "x-team: blue", "x-team: [blue]", "- {methods: [POST", "spec.access[0].routes[1].headers.x-team", "want text"},
	{"headers that are a text", "headers: {x-team: blue}", "headers: blue", "- {methods: [POST", "spec.access[0].routes[1].headers", "want a mapping"},

	{"issuer without TLS", "https://login", "http://login", "issuer", "spec.issuer", "not the URL of an issuer"},
	{"issuer with a query", "login.example.org\n", "login.example.org?a=b\n", "issuer", "spec.issuer", "not the URL of an issuer"},
	{"issuer with a user", "https://login", "https://me@login", "issuer", "spec.issuer", "not the URL of an issuer"},
	{"no issuer", "  issuer: https://login.example.org\n", "", "spec:\n  audiences", "spec.issuer", "is missing"},
	{"tokens for anybody", "  audiences: [\"https://web.example.org\"]\n  login", "  login", "spec:\n  issuer", "spec.audiences", "at least one"},
	{"unsigned tokens", "  login: {", "  algorithms: [none]\n  login: {", "algorithms", "spec.algorithms[0]", "no signature that proves"},
	{"tokens by a shared key", "  login: {", "  algorithms: [RS256, HS256]\n  login: {", "algorithms", "spec.algorithms[1]", "no signature that proves"},
	{"endpoint without port", "  login: {", "  endpoints: [login.example.org]\n  login: {", "endpoints", "spec.endpoints[0]", "address to connect to"},
	{"much skew", "  login: {", "  skew: 6m\n  login: {", "skew", "spec.skew", "is not from"},
	{"keys for ever", "  login: {", "  keep: 721h\n  login: {", "keep", "spec.keep", "is not from"},
	{"a CA that is a key", "  login: {", "  ca: \"-----BEGIN PRIVATE KEY-----\\nMA==\\n-----END PRIVATE KEY-----\"\n  login: {", "ca:", "spec.ca", `has a block "PRIVATE KEY"`},
	{"client of no name", "clientID: sallyport, ", "", "login: {", "spec.login.clientID", "is missing"},
	{"relative secret", "/etc/sallyport/corp.secret", "corp.secret", "login: {", "spec.login.clientSecretFile", "not such a path"},
	{"two scopes in one", "[email]", `["email profile"]`, "login: {", "spec.login.scopes[0]", "not a scope"},
	{"long session", "session: 4h", "session: 721h", "login: {", "spec.login.session", "is not from"},
	{"idle for longer than the session", "idle: 30m", "idle: 5h", "login: {", "spec.login.idle", "is not from 1m to 4h"},
}

func TestWrongWebs(t *testing.T) {
	for _, w := range wrongWebs {
		t.Run(w.name, func(t *testing.T) {
			if !strings.Contains(web, w.old) {
				t.Fatalf("the set does not have %q", w.old)
			}
			text := strings.Replace(web, w.old, w.new, 1)
			_, err := policy.Parse("resources.yaml", []byte(text))
			if w.msg == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			checkOne(t, text, err, w)
		})
	}
}

// TestHTTPNeedsHTTP: what is about requests and tokens is refused where the proxy sees neither.
func TestHTTPNeedsHTTP(t *testing.T) {
	for more, field := range map[string]string{
		"      routes: [{methods: [GET]}]": "spec.access[0].routes",
		"      subjects: [corp/alice]":     "spec.access[0].subjects[0]",
		"      groups: [corp/dba]":         "spec.access[0].groups[0]",
		`      when: 'path == "/"'`:        "spec.access[0].when",
	} {
		text := strings.Replace(good, `spiffe://example.org/ops/*"]`, `spiffe://example.org/ops/*"]`+"\n"+more, 1)
		_, err := policy.Parse("resources.yaml", []byte(text))
		if errs := policy.Errors(err); len(errs) != 1 || errs[0].Field != field || errs[0].Hint == "" {
			t.Errorf("%s: %v", more, err)
		}
	}
}

// TestHTTPOverUDP: nothing of a datagram comes through the proxy.
func TestHTTPOverUDP(t *testing.T) {
	_, err := policy.Parse("resources.yaml", []byte(head+"ProtectedService\nmetadata: {name: web}\nspec: {target: Host, protocol: UDP, ports: [80], http: {}}\n"))
	if errs := policy.Errors(err); len(errs) != 1 || errs[0].Field != "spec.http" {
		t.Error(err)
	}
}

// TestProvidersOfAService: each must be there, be another one by its tokens, and have a login where the service wants one.
func TestProvidersOfAService(t *testing.T) {
	second := "---\n" + head + "IdentityProvider\nmetadata: {name: second}\nspec: {issuer: https://ISSUER, audiences: [b]}\n"
	for name, c := range map[string]struct{ text, field string }{
		"both":           {strings.Replace(web, "providers: [corp]", "providers: [corp, second]", 1) + strings.Replace(second, "ISSUER", "b.example.org", 1), ""},
		"of one issuer":  {strings.Replace(web, "providers: [corp]", "providers: [corp, second]", 1) + strings.Replace(second, "ISSUER", "login.example.org", 1), "spec.http.providers[1]"},
		"none":           {web[:strings.LastIndex(web, "---")], "spec.http.providers[0]"},
		"without login":  {web[:strings.LastIndex(web, "  login:")], "spec.http.login"},
		"twice the same": {web + web[strings.LastIndex(web, "---"):], "metadata.name"},
	} {
		_, err := policy.Parse("resources.yaml", []byte(c.text))
		if errs := policy.Errors(err); len(errs) != map[bool]int{true: 1}[c.field != ""] || c.field != "" && errs[0].Field != c.field {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDefaultsOfHTTP: what is not written is there all the same, and signed with the rest.
func TestDefaultsOfHTTP(t *testing.T) {
	set := mustParse(t, head+"ProtectedService\nmetadata: {name: plain}\nspec: {target: Host, ports: [80], http: {}}\n---\n"+
		head+"IdentityProvider\nmetadata: {name: corp}\nspec: {issuer: \"https://[fd00::1]:8443/realm\", audiences: [a], login: {clientID: c, session: 30m}}\n")
	for _, want := range []string{"authenticate:\n      - spiffe", "headerBytes: 32KiB", "headerTimeout: 10s", "bodyTimeout: 30s", "streams: 100",
		"- RS256\n    - PS256\n    - ES256\n    - EdDSA", "subjectClaim: sub", "groupsClaim: groups", "'[fd00::1]:8443'", "skew: 30s", "keep: 24h", "session: 30m", "idle: 30m"} {
		if !strings.Contains(string(set.YAML()), want) {
			t.Errorf("no %q in\n%s", want, set.YAML())
		}
	}
	if p, ok := set.Provider("corp"); !ok || p.Source.Line != 6 || len(set.Providers()) != 1 {
		t.Errorf("provider %+v", p)
	}
	if _, ok := set.Provider("other"); ok || (*policy.Set)(nil).Providers() != nil {
		t.Error("found a provider that is not there")
	}
}

// TestWebRoundTrip: the canonical form of HTTP services and providers is read as the same.
func TestWebRoundTrip(t *testing.T) { checkRoundTrip(t, mustParse(t, web)) }
