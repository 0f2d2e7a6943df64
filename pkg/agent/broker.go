package agent

import (
	"fmt"
	"log/slog"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// openBroker makes a client of whoever tells the identities of workloads, or nil where nobody does.
func openBroker(cfg policy.AgentConfig, own *identity.Source, log *slog.Logger) (identity.Broker, error) {
	client := identity.BrokerConfig{Address: cfg.Spec.Workloads.Address, Logger: log}
	switch cfg.Spec.Workloads.API {
	case policy.WorkloadsBroker:
		domain, err := spiffeid.TrustDomainFromString(cfg.Spec.TrustDomain)
		if err != nil {
			return nil, err
		}
		return identity.NewSPIFFEBroker(client, own, domain)
	case policy.WorkloadsDelegated:
		return identity.NewSPIREDelegated(client)
	default:
		return nil, nil
	}
}

func (n *node) closeBroker() error {
	if n.broker == nil {
		return nil
	}
	return n.broker.Close()
}

// brokerState tells of whoever knows the workloads' identities; empty where nobody is asked.
func (n *node) brokerState() string {
	if n.broker == nil {
		return ""
	}
	return fmt.Sprintf("; workloads by %s: %s", n.cfg.Spec.Workloads.API, oneLine(n.broker.Status().String()))
}

// trustState names the trust domains beside the own one whose identities are verified.
func trustState(own string, trusts []identity.Trust) string {
	var foreign []string
	for _, t := range trusts {
		if t.Domain.Name() != own {
			foreign = append(foreign, fmt.Sprintf("%s (%d X.509, %d JWT keys)", t.Domain.Name(), t.X509, t.JWT))
		}
	}
	if len(foreign) == 0 {
		return ""
	}
	return "; federated with " + strings.Join(foreign, ", ")
}
