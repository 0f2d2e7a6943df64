package agent

import (
	"regexp"
	"strings"
)

// container is what the path of a control group says of who is in it.
type container struct {
	pod   string // UID; empty: of no pod
	id    string // empty: of no container
	top   string // path of the pod's own control group, which ends with the pod
	infra bool   // of a pod, but in none of its containers
}

var (
	podUID = regexp.MustCompile(`^(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32})$`) // static pods have a hash
	// Names of containers, as the runtimes give them under systemd and without.
	containerName = regexp.MustCompile(`^(?:(?:cri-containerd|crio|docker|libpod)-)?([0-9a-f]{64})(?:\.scope)?$`)
)

// containerOf reads the path of a control group, from the root of the hierarchy on, as kubelet and the runtimes make them. Only what
// root alone can make counts: a look-alike below a user's or a container's own group is none. A process in a pod's
// group that is in none of its containers is the runtime's own.
func containerOf(path string) container {
	names := strings.Split(strings.Trim(path, "/"), "/")
	if c, ok := ofPod(names); ok {
		return c
	}
	if len(names) > 1 && (names[0] == "system.slice" || names[0] == "machine.slice" || names[0] == "docker") {
		return container{id: containerID(names[1])}
	}
	return container{}
}

// ofPod follows kubelet's hierarchy: [kubelet] kubepods [class] pod container, where systemd has each name begin with the one above.
func ofPod(names []string) (container, bool) {
	at, prefix := 0, ""
	if names[0] == "kubelet" || names[0] == "kubelet.slice" { // its --cgroup-root
		at, prefix = 1, "kubelet-"
	}
	slices := at < len(names) && names[at] == prefix+"kubepods.slice"
	if !slices && (at >= len(names) || names[at] != "kubepods") {
		return container{}, false
	}
	prefix += "kubepods-"
	for _, class := range []string{"burstable", "besteffort"} {
		if at+1 < len(names) && names[at+1] == class && !slices {
			at++
		} else if at+1 < len(names) && names[at+1] == prefix+class+".slice" && slices {
			at, prefix = at+1, prefix+class+"-"
		}
	}
	if at+2 >= len(names) {
		return container{infra: true}, true
	}
	uid, ok := strings.CutPrefix(names[at+1], "pod")
	if slices {
		uid, ok = strings.CutPrefix(strings.TrimSuffix(names[at+1], ".slice"), prefix+"pod")
		uid = strings.ReplaceAll(uid, "_", "-")
	}
	id := containerID(names[at+2])
	if !ok || !podUID.MatchString(uid) || id == "" {
		return container{infra: true}, true
	}
	return container{pod: uid, id: id, top: "/" + strings.Join(names[:at+2], "/")}, true
}

func containerID(name string) string {
	if found := containerName.FindStringSubmatch(name); found != nil {
		return found[1]
	}
	return ""
}
