package collector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// listenUnix listens on a Unix socket that everybody may connect to: who may speak is decided by the
// kernel's word about the caller. A socket that nobody serves any more is replaced.
func listenUnix(path string) (net.Listener, error) {
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, fmt.Errorf("listen on %s: another process serves it", path)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// peerCred admits callers of a Unix socket by their user id. It is gRPC's transport credentials, so
// that no byte of a stranger is parsed.
type peerCred struct{ uids []uint32 }

type peerCredInfo struct {
	credentials.CommonAuthInfo
	uid uint32
}

// AuthType names the way in which the caller was proven.
func (peerCredInfo) AuthType() string { return "peercred" }

func newPeerCred(uids []uint32) peerCred {
	if len(uids) == 0 {
		uids = []uint32{0}
	}
	return peerCred{uids: uids}
}

// ServerHandshake asks the kernel who connected.
func (p peerCred) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uid, err := peerUID(conn)
	if err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("read peer credentials: %w", err)
	}
	if !slices.Contains(p.uids, uid) {
		conn.Close()
		return nil, nil, fmt.Errorf("user %d may not read here", uid)
	}
	return conn, peerCredInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, uid: uid}, nil
}

func peerUID(conn net.Conn) (uint32, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%T is no Unix socket", conn)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var sockErr error
	if err := raw.Control(func(fd uintptr) { cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if sockErr != nil {
		return 0, sockErr
	}
	return cred.Uid, nil
}

// ClientHandshake is not for servers.
func (peerCred) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers")
}

// Info describes the protocol.
func (peerCred) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

// Clone copies.
func (p peerCred) Clone() credentials.TransportCredentials { return p }

// OverrideServerName has nothing to override.
func (peerCred) OverrideServerName(string) error { return nil }
