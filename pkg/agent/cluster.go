package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/kube"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// firstAnswer is how long a node that has no verified set waits for the API server to have one.
const firstAnswer = time.Minute

// kubeSource makes the source of a configuration with a cluster. It asks nobody anything yet.
func kubeSource(cfg policy.AgentConfig, log *slog.Logger) (*kube.Source, error) {
	return kube.New(kube.Config{Node: cfg.ClusterNode(), Audience: cfg.Name, Kubeconfig: cfg.Spec.Kubernetes.Kubeconfig, Logger: log})
}

func (n *node) makeCluster(context.Context) (err error) {
	if n.cfg.Spec.Kubernetes == nil {
		return nil
	}
	if n.kube, err = kubeSource(n.cfg, n.log); err == nil {
		n.kube.Pods() // it is watched from the beginning
	}
	return err
}

// followPods has the services that choose their pods follow these.
func (n *node) followPods(ctx context.Context) error {
	if n.kube == nil {
		<-ctx.Done()
		return nil
	}
	return n.kube.FollowPods(ctx, func(all []policy.Pod) {
		n.problems.report(problemPods, podsKept, n.pods.Set(all))
	})
}

func (n *node) runCluster(ctx context.Context) error {
	if n.kube == nil {
		<-ctx.Done()
		return nil
	}
	return n.kube.Run(ctx)
}

// origin is where this node's resources come from. One that has no verified set has nothing to do before the API server has answered.
func (n *node) origin(ctx context.Context) (origin, error) {
	if n.kube == nil {
		return files(n.cfg.Spec.Resources), nil
	}
	last, err := (&resources{verified: verifiedFile(n.cfg)}).last()
	if last == nil && err == nil {
		ctx, cancel := context.WithTimeout(ctx, firstAnswer)
		defer cancel()
		if err := n.kube.Wait(ctx); err != nil {
			return nil, fmt.Errorf("there are no verified resources to begin with: %w", err)
		}
	}
	return &cluster{source: n.kube, problems: n.problems}, nil
}

// cluster is an origin: what the API server has, whose word proves nothing.
type cluster struct {
	source   *kube.Source
	problems *problems
	seen     []kube.Resource // that the last read found; owned by whoever reads
}

func (c *cluster) read() (offer, error) {
	all, err := c.source.Resources()
	c.seen = all
	if err != nil {
		return offer{}, err
	}
	set, err := setOf(all)
	if err != nil {
		return offer{}, err
	}
	o := offer{set: set, signedAt: kube.Where, piecemeal: true}
	o.signatures = func() ([]byte, error) { return signaturesOf(all) }
	if name := set.Name(); name != "" {
		o.signedAt = kube.Origin(policy.KindResourceSet, name)
	}
	return o, nil
}

// setOf reads the resources of a cluster as the files of a directory are read.
func setOf(all []kube.Resource) (*policy.Set, error) {
	documents := make([]policy.Document, 0, len(all))
	for _, r := range all {
		d, err := r.Document()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.Origin(), err)
		}
		documents = append(documents, d)
	}
	return policy.ParseDocuments(kube.Where, documents)
}

// signaturesOf gives those that the ResourceSet carries.
func signaturesOf(all []kube.Resource) ([]byte, error) {
	for _, r := range all {
		if r.Kind == policy.KindResourceSet && r.Signatures != "" {
			if len(r.Signatures) > grant.MaxEnvelope {
				return nil, fmt.Errorf("the annotation %s has more than %d bytes", kube.Signatures, grant.MaxEnvelope)
			}
			return []byte(r.Signatures), nil
		}
	}
	return nil, fmt.Errorf("the ResourceSet has no annotation %s", kube.Signatures)
}

// watch tells of what keeps the node from following the API server, too: it goes on with what it has.
func (c *cluster) watch(ctx context.Context, changed func()) error {
	for {
		next := c.source.Changed()
		c.problems.report(problemCluster, "", c.source.Trouble())
		changed()
		select {
		case <-ctx.Done():
			return nil
		case <-next:
		}
	}
}

// tell has the verdict on each resource written into the cluster.
func (c *cluster) tell(inForce *policy.Set, err error) {
	if errors.Is(err, kube.ErrNotRead) {
		return
	}
	for _, r := range c.seen {
		if v, judged := verdictOf(r, inForce, err); judged {
			c.source.Judge(r.Kind, r.Name, v)
		}
	}
}

// verdictOf is what a node makes of one resource, by what became of the set. Nothing is said of one that is not to blame for the
// refusal of the set.
func verdictOf(r kube.Resource, inForce *policy.Set, err error) (v kube.Verdict, judged bool) {
	v = kube.Verdict{Generation: r.Generation, Accepted: true, Reason: "Valid"}
	var why []string
	for _, e := range policy.Errors(err) {
		if e.File != r.Origin() {
			continue
		}
		v.Accepted, v.Reason = false, "Invalid"
		if errors.Is(e, ErrLooser) {
			v.Reason = "NotSigned"
		}
		why = append(why, plainLines(inWords(e)))
	}
	if v.Message = strings.Join(why, "; "); !v.Accepted {
		return v, true
	}
	if r.Kind == policy.KindResourceSet && err == nil {
		return versionVerdict(r, v, inForce), true
	}
	return v, err == nil
}

// versionVerdict says of a ResourceSet whose version does not count that it is not taken.
func versionVerdict(r kube.Resource, v kube.Verdict, inForce *policy.Set) kube.Verdict {
	spec, _ := r.Spec.(map[string]any)
	if version := fmt.Sprint(spec["version"]); inForce.Name() != r.Name || version != fmt.Sprint(inForce.Version()) {
		v.Accepted, v.Reason = false, "NotSigned"
		v.Message = fmt.Sprintf("version %s counts when all of the set is there that was signed with it; version %d is in force", version, inForce.Version())
	}
	return v
}
