package policy_test

import (
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func TestIdleIsTheShorter(t *testing.T) {
	const none, short, long = 0, time.Minute, time.Hour
	for _, c := range []struct{ asked, most, want time.Duration }{
		{none, none, none}, {none, long, long}, {short, none, short}, {short, long, short}, {long, short, short},
	} {
		p := policy.BypassPolicy{Spec: policy.BypassPolicySpec{IdleTimeout: policy.Duration{Duration: c.most}}}
		if got := p.Idle(c.asked); got != c.want {
			t.Errorf("asked for %v under %v: %v, want %v", c.asked, c.most, got, c.want)
		}
	}
}
