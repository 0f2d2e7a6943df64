package agent

import (
	"strings"
	"testing"
)

func TestContainerOf(t *testing.T) {
	const (
		uid    = "0c6f6a43-77c9-4b4e-9a4c-0f4a5bfb1d6e"
		other  = "11111111-2222-3333-4444-555555555555"
		hashed = "1f2e3d4c5b6a79880123456789abcdef" // a static pod's
	)
	under := strings.ReplaceAll(uid, "-", "_")
	id := strings.Repeat("0a", 32)
	pod := func(uid, top string) container { return container{pod: uid, id: id, top: top} }
	for path, want := range map[string]container{
		// systemd
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope":                                       pod(uid, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod"+under+".slice"),
		"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/crio-" + id + ".scope":                                               pod(uid, "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod"+under+".slice"),
		"/kubepods.slice/kubepods-pod" + under + ".slice/docker-" + id + ".scope":                                                                                  pod(uid, "/kubepods.slice/kubepods-pod"+under+".slice"),
		"/kubepods.slice/kubepods-pod" + hashed + ".slice/cri-containerd-" + id + ".scope/init.scope":                                                              pod(hashed, "/kubepods.slice/kubepods-pod"+hashed+".slice"),
		"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + under + ".slice/cri-containerd-" + id + ".scope":                                            pod(uid, "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod"+under+".slice"),
		"/kubepods.slice/kubepods-pod" + under + ".slice/cri-containerd-" + id + ".scope/kubepods/pod" + other + "/" + id:                                          pod(uid, "/kubepods.slice/kubepods-pod"+under+".slice"), // a pod made the rest
		"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope": pod(uid, "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod"+under+".slice"),
		// cgroupfs
		"/kubepods/burstable/pod" + uid + "/" + id:         pod(uid, "/kubepods/burstable/pod"+uid),
		"/kubepods/pod" + uid + "/" + id + "/a/b":          pod(uid, "/kubepods/pod"+uid),
		"/kubepods/besteffort/pod" + uid + "/crio-" + id:   pod(uid, "/kubepods/besteffort/pod"+uid),
		"/kubelet/kubepods/burstable/pod" + uid + "/" + id: pod(uid, "/kubelet/kubepods/burstable/pod"+uid),
		// containers of no pod
		"/system.slice/docker-" + id + ".scope":  {id: id},
		"/machine.slice/libpod-" + id + ".scope": {id: id},
		"/docker/" + id:                          {id: id},
		// nobody's
		"/": {}, "": {}, "/kubepods": {infra: true}, "/kubelet": {}, "/kubepods.slice/kubepods-burstable.slice": {infra: true},
		"/system.slice/ssh.service": {}, "/docker": {},
		"/kubepods/pod" + uid: {infra: true}, // in none of the pod's containers
		"/kubepods.slice/kubepods-pod" + under + ".slice/crio-conmon-" + id + ".scope": {infra: true},
		"/kubepods/burstable/pod" + uid[1:] + "/" + id:                                 {infra: true},
		"/kubepods/pod../" + id: {infra: true},
		"/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id + ".scope": {infra: true},
		"/kubepods/pod" + under + "/" + id: {infra: true},
		"/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod" + under + ".slice/docker-" + id + ".scope": {},
		"/user.slice/user-1000.slice/user@1000.service/kubepods/pod" + uid + "/" + id:                                          {},
		"/system.slice/a.service/docker-" + id + ".scope":                                                                      {},
	} {
		if got := containerOf(path); got != want {
			t.Errorf("%s: %+v, want %+v", path, got, want)
		}
	}
}
