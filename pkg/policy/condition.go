package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/ext"
)

// condition is the When of an access rule.
type condition struct {
	whole   cel.Program // of everything that is known; nil: no condition
	partial cel.Program // before there is a request
	now     bool        // it looks at the time
}

// ofRequest are the variables that only a request has.
var ofRequest = []string{"method", "host", "path", "headers"}

// ofCaller are flat, so that a misspelt one is found when the policy is read.
var ofCaller = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(
		cel.Variable("identity", cel.StringType), cel.Variable("provider", cel.StringType), cel.Variable("subject", cel.StringType),
		cel.Variable("groups", cel.ListType(cel.StringType)), cel.Variable("claims", cel.MapType(cel.StringType, cel.DynType)),
		cel.Variable("proof", cel.StringType), cel.Variable("client", cel.StringType), cel.Variable("now", cel.TimestampType),
		ext.Network(), ext.Strings(),
	)
})

// ofHTTP are those of a caller and a request.
var ofHTTP = sync.OnceValues(func() (*cel.Env, error) {
	env, err := ofCaller()
	if err != nil {
		return nil, err
	}
	return env.Extend(
		cel.Variable("method", cel.StringType), cel.Variable("host", cel.StringType), cel.Variable("path", cel.StringType),
		cel.Variable("headers", cel.MapType(cel.StringType, cel.ListType(cel.StringType))),
	)
})

// compileCondition reads the condition of an access rule. It must be true or false.
func compileCondition(text string, http bool) (c condition, err error) {
	variables, known := ofCaller, "identity, provider, subject, groups, claims, proof, client and now"
	if http {
		variables, known = ofHTTP, known+", and of the request method, host, path and headers"
	}
	env, err := variables()
	if err != nil {
		return c, fmt.Errorf("make conditions: %w", err)
	}
	ast, err := checkedWhen(env, text, known)
	if err != nil {
		return c, err
	}
	for _, ref := range ast.NativeRep().ReferenceMap() {
		c.now = c.now || ref.Name == "now"
	}
	limit := cel.CostLimit(whenCost)
	if c.whole, err = env.Program(ast, limit); err == nil && http {
		c.partial, err = env.Program(ast, limit, cel.EvalOptions(cel.OptPartialEval))
	}
	return c, err
}

// holds gives nil where the condition is met. One that cannot be worked out is not; one that depends on a request that is not there
// yet may be.
func (c condition) holds(who Caller, r *Request, now time.Time) error {
	if c.whole == nil {
		return nil
	}
	known := map[string]any{
		"identity": identityText(who), "provider": who.Provider, "subject": who.Subject, "groups": whole(who.Groups),
		"claims": who.Claims, "proof": who.proof(), "client": addressText(who.Address), "now": now.UTC(),
	}
	if who.Claims == nil {
		known["claims"] = map[string]any{}
	}
	program, input := c.whole, any(known)
	switch {
	case c.partial == nil: // of no requests
	case r != nil:
		maps.Copy(known, map[string]any{"method": r.Method, "host": r.Host, "path": r.Path, "headers": headersOf(r)})
	default:
		var unknown []*cel.AttributePatternType
		for _, name := range ofRequest {
			unknown = append(unknown, cel.AttributePattern(name))
		}
		some, err := cel.PartialVars(known, unknown...)
		if err != nil {
			return fmt.Errorf("it cannot be worked out: %w", err)
		}
		program, input = c.partial, some
	}
	result, _, err := program.Eval(input)
	switch {
	case err != nil:
		return fmt.Errorf("it cannot be worked out: %w", err)
	case types.IsUnknown(result) && program == c.partial:
		return nil
	}
	if met, ok := result.Value().(bool); !ok || !met {
		return errWhenFalse
	}
	return nil
}

func identityText(who Caller) string {
	if who.ID.IsZero() {
		return ""
	}
	return who.ID.String()
}

func addressText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return plainAddress(a).String()
}

// whole is a list that is not nil, which CEL would take for null.
func whole(list []string) []string { return slices.Concat([]string{}, list) }

func headersOf(r *Request) map[string][]string {
	if r.Headers == nil {
		return map[string][]string{}
	}
	return r.Headers
}
