package agent

import (
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// endIdle tells whether a grant is over because its paths carried nothing for as long as they may; 0 is no such time. An
// agent that has just come counts from its first look, so a restart makes a path no older than its deadline, but may make
// it idle for longer.
func (h *held) endIdle(most, now time.Duration) (ending, bool) {
	if most == 0 || now-h.use.moved < most {
		return ending{}, false
	}
	e := ending{grant: h.row.ID, actor: "agent"}
	return e.as(stateIdle, stepIdle, datapath.PathRevoked, "nothing was sent for "+policy.Duration{Duration: most}.String()), true
}
