package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/ext"
)

// whenCost is the most that one condition may cost, in CEL's units: about that many simple steps.
const whenCost = 10000

// maxWhen is the longest condition in bytes.
const maxWhen = 4096

// whenVariables are what a condition may look at. They are flat, so that a misspelt one is found when the policy is read.
var whenVariables = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(
		cel.Variable("service", cel.StringType), cel.Variable("ports", cel.ListType(cel.IntType)),
		cel.Variable("addresses", cel.ListType(cel.StringType)), cel.Variable("binding", cel.StringType),
		cel.Variable("duration", cel.DurationType), cel.Variable("bytes", cel.UintType),
		cel.Variable("reason", cel.StringType), cel.Variable("ticket", cel.StringType),
		cel.Variable("requester", cel.StringType), cel.Variable("approvers", cel.ListType(cel.StringType)),
		cel.Variable("now", cel.TimestampType), ext.Network(), ext.Strings(),
	)
})

// compileWhen reads a condition. It must be true or false.
func compileWhen(text string) (cel.Program, error) {
	env, err := whenVariables()
	if err != nil {
		return nil, fmt.Errorf("make conditions: %w", err)
	}
	ast, err := checkedWhen(env, text, "service, ports, addresses, binding, duration, bytes, reason, ticket, requester, approvers and now")
	if err != nil {
		return nil, err
	}
	return env.Program(ast, cel.CostLimit(whenCost), cel.InterruptCheckFrequency(100))
}

// checkedWhen reads a condition of the variables that are known.
func checkedWhen(env *cel.Env, text, known string) (*cel.Ast, error) {
	if len(text) > maxWhen {
		return nil, faultf("shorten it", "has %d bytes, the most is %d", len(text), maxWhen)
	}
	ast, issues := env.Compile(text)
	if issues.Err() != nil {
		e := issues.Errors()[0]
		return nil, faultf("see the CEL language; known are "+known, "is no condition: at column %d: %s", e.Location.Column()+1, e.Message)
	}
	if !ast.OutputType().IsExactType(cel.BoolType) {
		return nil, faultf("compare it with something", "gives %s, not true or false", ast.OutputType())
	}
	return ast, nil
}

// errWhenFalse says that the condition holds not.
var errWhenFalse = errors.New("it is not met")

// checkWhen gives nil where the condition holds. One that cannot be worked out does not hold.
func checkWhen(program cel.Program, g GrantFacts) error {
	result, _, err := program.Eval(map[string]any{
		"service": g.Service, "ports": integers(g.Ports), "addresses": addressTexts(g.Addresses), "binding": g.Binding,
		"duration": g.Duration, "bytes": uint64(g.Budget.Bytes), "reason": g.Reason, "ticket": g.Ticket,
		"requester": g.Requester, "approvers": approversOf(g), "now": g.Now.UTC(),
	})
	if err != nil {
		return fmt.Errorf("it cannot be worked out: %w", err)
	}
	if met, ok := result.Value().(bool); !ok || !met {
		return errWhenFalse
	}
	return nil
}

func integers(ports []uint16) []int64 {
	out := make([]int64, 0, len(ports))
	for _, p := range ports {
		out = append(out, int64(p))
	}
	return out
}

func addressTexts(list []netip.Addr) []string {
	out := make([]string, 0, len(list))
	for _, a := range list {
		out = append(out, a.String())
	}
	return out
}

// approversOf are the people other than the requester whose signatures count as approvals, each once.
func approversOf(g GrantFacts) []string {
	people := []string{}
	for _, s := range g.Signers {
		if s.Person != g.Requester && s.May(g.UseOf(UseApprove)) && !slices.Contains(people, s.Person) {
			people = append(people, s.Person)
		}
	}
	return people
}
