package policy

// KubernetesConfig says where the resources of a node come from, if they do not come from files: the API server of a cluster.
type KubernetesConfig struct {
	// Node is the node's name in the cluster: the name of the configuration.
	Node string `json:"node,omitempty" yaml:"node,omitempty"`
	// Kubeconfig is a file that says how to reach the API server. Left out: by the service account of the pod.
	Kubeconfig string `json:"kubeconfig,omitempty" yaml:"kubeconfig,omitempty"`
}

func (k *KubernetesConfig) validate(d *document) {
	if k == nil {
		return
	}
	if k.Node != "" {
		d.report("spec.kubernetes.node", CheckNodeName(k.Node))
	}
	if k.Kubeconfig != "" {
		d.report("spec.kubernetes.kubeconfig", checkPath(k.Kubeconfig))
	}
}

// ClusterNode is the node's name in the cluster.
func (c AgentConfig) ClusterNode() string {
	if c.Spec.Kubernetes != nil && c.Spec.Kubernetes.Node != "" {
		return c.Spec.Kubernetes.Node
	}
	return c.Name
}
