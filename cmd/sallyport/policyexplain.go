package main

import (
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// accessQuestion is what `policy explain` is asked, as flags have it.
type accessQuestion struct {
	policy.AccessQuestion
	from, at               string
	claims, headers, heard []string // NAME=VALUE
}

func (c *cli) policyExplain() *cobra.Command {
	var q accessQuestion
	cmd := &cobra.Command{
		Use:   "explain SERVICE FILE... | DIR",
		Short: "Say whether a caller and a request would come in, and by which rule",
		Long: `Ask one set of resources whether a caller may come through the proxy to SERVICE, and of a service with http, whether with a
request: all the FILEs together, or the *.yaml files of DIR. It is the proxy's own evaluator; nothing is sent, and no node is asked.
A refusal names the rules that came nearest. Without --path it asks whether any request could be allowed.`,
		Example: `  sallyport policy explain postgres /etc/sallyport/resources.d --identity spiffe://example.org/app/web
  sallyport policy explain web /etc/sallyport/resources.d --subject corp/carol --group corp/admins --claim mfa=true --from 10.1.0.9 --path /admin/users`,
		Args: between(2, -1),
		RunE: func(_ *cobra.Command, args []string) error {
			set, err := loadPolicy(args[1:])
			if err != nil {
				return err
			}
			asked, err := q.read(c.now())
			if err != nil {
				return err
			}
			d, err := set.Ask(args[0], asked)
			if err != nil {
				return explained("ask resources", err)
			}
			return c.show(accessAnswer{d.Allowed, d.Rule, append([]string{}, d.Near...)}, func(t *table) { accessTable(t, d) })
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&q.Identity, "identity", "", "the caller proved this SPIFFE `ID`")
	f.StringVar(&q.Subject, "subject", "", "or came with a token about `PROVIDER/SUBJECT`")
	f.StringArrayVar(&q.Groups, "group", nil, "with this `PROVIDER/GROUP`; can be given again")
	f.StringArrayVar(&q.claims, "claim", nil, "with this claim, `NAME=VALUE`, as JSON or text; can be given again")
	f.StringVar(&q.Proof, "proof", "", "`HOW` it was proven: spiffe, jwt, oidc or local")
	f.StringVar(&q.from, "from", "", "the caller's `ADDRESS`")
	f.StringVar(&q.at, "at", "", "at this `TIME`, like 2027-01-01T00:00:00Z, not now")
	f.StringArrayVar(&q.heard, "signal", nil, "`SOURCE=ok` or SOURCE=against: what a source says about the caller; can be given again")
	f.StringVar(&q.Method, "method", "", "`METHOD` of the request: GET")
	f.StringVar(&q.Path, "path", "", "`PATH` of the request")
	f.StringVar(&q.Host, "host", "", "`HOST` of the request: the first of the service's")
	f.StringArrayVar(&q.headers, "header", nil, "`NAME=VALUE` of the request; can be given again")
	return cmd
}

// read takes the flags for a question at now, if they name no other time.
func (q accessQuestion) read(now time.Time) (policy.AccessQuestion, error) {
	asked := q.AccessQuestion
	asked.At = now
	if q.at != "" {
		at, err := time.Parse(time.RFC3339, q.at)
		if err != nil {
			return asked, withHint(usagef("read --at %q: not a time", q.at), "write it like 2027-01-01T00:00:00Z")
		}
		asked.At = at
	}
	if q.from != "" {
		from, err := netip.ParseAddr(q.from)
		if err != nil {
			return asked, withHint(usagef("read --from %q: not an address", q.from), "write it like 10.1.0.9 or fd00::9")
		}
		asked.From = &from
	}
	for _, of := range []struct {
		flag  string
		pairs []string
		into  *map[string]string
	}{{"claim", q.claims, &asked.Claims}, {"header", q.headers, &asked.Headers}, {"signal", q.heard, &asked.Signals}} {
		*of.into = map[string]string{}
		for _, pair := range of.pairs {
			name, value, ok := strings.Cut(pair, "=")
			if !ok || name == "" {
				return asked, withHint(usagef("read --%s %q: no name and value", of.flag, pair), "write NAME=VALUE")
			}
			(*of.into)[name] = value
		}
	}
	return asked, nil
}

// accessAnswer is the answer for machines.
type accessAnswer struct {
	Allowed bool     `json:"allowed"`
	Rule    string   `json:"rule"`
	Near    []string `json:"near"`
}

func accessTable(t *table, d policy.Decision) {
	if d.Allowed {
		t.row("allowed", "yes")
		t.row("rule", d.Rule)
		return
	}
	t.row("allowed", "no")
	for _, near := range d.Near {
		t.row("nearest", near)
	}
}
