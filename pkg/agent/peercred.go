package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// peerCred is who the kernel says is at the other end of a Unix socket.
type peerCred struct {
	credentials.CommonAuthInfo
	Pid      int32
	Uid, Gid uint32
	Groups   []uint32 // supplementary groups
}

// AuthType names the proof, as gRPC wants it.
func (peerCred) AuthType() string { return "peercred" }

func (p peerCred) String() string { return fmt.Sprintf("uid:%d", p.Uid) }

// callers are the users and groups that may use a socket.
type callers struct {
	uids, gids []uint32
}

func (c callers) admit(p peerCred) bool {
	return slices.Contains(c.uids, p.Uid) || slices.Contains(c.gids, p.Gid) ||
		slices.ContainsFunc(p.Groups, func(g uint32) bool { return slices.Contains(c.gids, g) })
}

// sole gives the only user that may call, if there is just one.
func (c callers) sole() (uid uint32, ok bool) {
	if len(c.uids) != 1 || len(c.gids) != 0 {
		return 0, false
	}
	return c.uids[0], true
}

// peerTransport are gRPC credentials that admit a connection by SO_PEERCRED, before a byte of it is read.
type peerTransport struct{ allow callers }

func (t peerTransport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cred, err := readPeerCred(conn)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	if !t.allow.admit(cred) {
		conn.Close()
		return nil, nil, fmt.Errorf("refuse caller %s (pid %d): not an operator", cred, cred.Pid)
	}
	cred.SecurityLevel = credentials.PrivacyAndIntegrity
	return conn, cred, nil
}

func (t peerTransport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers")
}

func (t peerTransport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

func (t peerTransport) Clone() credentials.TransportCredentials { return t }

func (t peerTransport) OverrideServerName(string) error { return nil }

// caller tells who makes a call: the actor of its grant events.
func caller(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		if cred, ok := p.AuthInfo.(peerCred); ok {
			return cred.String()
		}
	}
	return "unknown"
}

func readPeerCred(conn net.Conn) (peerCred, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return peerCred{}, fmt.Errorf("read peer credentials: %T is no Unix socket", conn)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return peerCred{}, fmt.Errorf("read peer credentials: %w", err)
	}
	var cred peerCred
	var inner error
	if err := raw.Control(func(fd uintptr) { cred, inner = peerCredOf(int(fd)) }); err != nil {
		return peerCred{}, fmt.Errorf("read peer credentials: %w", err)
	}
	return cred, inner
}

func peerCredOf(fd int) (peerCred, error) {
	u, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return peerCred{}, fmt.Errorf("read peer credentials: %w", err)
	}
	groups, err := peerGroups(fd)
	if err != nil {
		return peerCred{}, fmt.Errorf("read peer groups: %w", err)
	}
	return peerCred{Pid: u.Pid, Uid: u.Uid, Gid: u.Gid, Groups: groups}, nil
}

// peerGroups reads SO_PEERGROUPS, for which x/sys/unix has no function.
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4], nil
		case errno == unix.ERANGE && int(size/4) > len(groups):
			groups = make([]uint32, size/4)
		default:
			return nil, errno
		}
	}
}
