package main

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-dev/sallyport/test/lab"
)

var gateway = spiffeid.RequireFromPath(domain, "/gateway")

const (
	nobodysUser = 65532
	authzPort   = 9471
)

// startAuthz runs `sallyport-proxy authz` beside the proxy, as its user.
func (b *bench) startAuthz() (process *lab.Process, socket string) {
	b.Helper()
	dir := filepath.Join(b.Dir, "authz")
	b.must(os.Mkdir(dir, 0o755))
	b.must(os.Chown(dir, nobodysUser, nobodysUser))
	socket = filepath.Join(dir, "authz.sock")
	config := filepath.Join(dir, "agent.yaml")
	authz := fmt.Sprintf("expiryGrace: 1s, authz: {socket: %s, listen: [%q], gateways: [%q]}}", socket, fmt.Sprintf("%s:%d", b.Node.Addr(lab.IPv4), authzPort), gateway)
	text := strings.Replace(b.config(settings{connections: 100, handshake: wait, idle: wait, dial: wait}), "expiryGrace: 0s}", authz, 1)
	b.must(os.WriteFile(config, []byte(text), 0o644))
	cmd := exec.Command("/proc/self/exe", authzCommand, "--config", config)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobodysUser, Gid: nobodysUser}}
	process, err := b.Node.Start(cmd)
	b.must(err)
	b.until(func() bool { return strings.Contains(process.Output(), "answering other proxies") })
	return process, socket
}

// request is what Envoy asks of a request, with the certificate of the identity.
func (b *bench) request(id spiffeid.ID, path string) *authv3.CheckRequest {
	b.Helper()
	at := func(ip string, port uint32) *authv3.AttributeContext_Peer {
		return &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}}
	}
	svid, err := b.authority.Issue(id)
	b.must(err)
	a := &authv3.AttributeContext{Source: at(b.Client.Addr(lab.IPv4).String(), 40000), Destination: at(b.Pod.Addr(lab.IPv4).String(), port)}
	a.Source.Principal = id.String()
	a.Source.Certificate = url.PathEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: svid.Certificates[0].Raw})))
	a.Request = &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Method: "GET", Path: path, Host: webName,
		Headers: map[string]string{"x-forwarded-user": "admin"}}}
	return &authv3.CheckRequest{Attributes: a}
}

// TestAuthz: the program, as its unit runs it, answers as the proxy beside it does, by the same policy, and records to the same agent.
func TestAuthz(t *testing.T) {
	b := newHTTPBench(t)
	process, socket := b.startAuthz()
	local, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	b.must(err)
	defer local.Close()
	svid, err := b.authority.Issue(gateway)
	b.must(err)
	remote, err := grpc.NewClient(fmt.Sprintf("passthrough:///%s:%d", b.Node.Addr(lab.IPv4), authzPort), grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		return b.Client.Dial(ctx, netip.AddrPort{}, netip.MustParseAddrPort(addr))
	}),
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(svid, b.authority.Bundle(), tlsconfig.AuthorizeID(proxyID)))))
	b.must(err)
	defer remote.Close()
	for name, conn := range map[string]*grpc.ClientConn{"socket": local, "mTLS": remote} {
		c := authv3.NewAuthorizationClient(conn)
		out, err := c.Check(b.ctx, b.request(web, "/public/a"))
		b.must(err)
		if codes.Code(out.GetStatus().GetCode()) != codes.OK || len(out.GetOkResponse().GetHeadersToRemove()) != 1 {
			t.Errorf("%s: %v", name, out)
		}
		out, err = c.Check(b.ctx, b.request(mallory, "/public/a"))
		b.must(err)
		if out.GetDeniedResponse().GetStatus().GetCode() != 403 {
			t.Errorf("%s, mallory: %v", name, out)
		}
	}
	if r := b.find("REQUEST", "IDENTITY"); r.Identity != web.String() || r.Service != "web" || !strings.Contains(r.Detail, "asked by") {
		t.Errorf("record %v", r)
	}
	if r := b.find("DENY", "NOT_AUTHORISED"); r.Identity != mallory.String() {
		t.Errorf("record %v", r)
	}

	b.writePolicy(httpPolicy(`[{identities: ["spiffe://example.org/app/other"]}]`))
	b.until(func() bool {
		out, err := authv3.NewAuthorizationClient(local).Check(b.ctx, b.request(web, "/public/a"))
		b.must(err)
		return out.GetDeniedResponse() != nil
	})
	b.must(process.Signal(syscall.SIGTERM))
	b.must(process.Wait(b.ctx))
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

// TestAuthzRefuses to run with more power than it needs, or where nobody may ask.
func TestAuthzRefuses(t *testing.T) {
	without := filepath.Join(t.TempDir(), "agent.yaml")
	with := filepath.Join(t.TempDir(), "agent.yaml")
	const text = "apiVersion: sallyport.dev/v1alpha1\nkind: AgentConfig\nmetadata: {name: n}\nspec: {trustDomain: example.org%s}\n"
	for file, more := range map[string]string{without: "", with: ", proxy: {authz: {socket: /run/a.sock}}"} {
		if err := os.WriteFile(file, fmt.Appendf(nil, text, more), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"--config", with}, []string{"runs as uid 0, and spec.proxy.uid is 65532", "hint: User=65532"}},
		{[]string{"--config", without}, []string{"has no spec.proxy.authz", "hint: "}},
		{[]string{"--config", "/no/such/file"}, []string{"/no/such/file"}},
		{[]string{"more"}, []string{`unexpected argument "more"`}},
	} {
		err := run(t.Context(), environment{args: append([]string{"sallyport-proxy", "authz"}, c.args...), stderr: io.Discard})
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("authz %q: %v, want %q", c.args, err, want)
			}
		}
	}
}
