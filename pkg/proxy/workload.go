package proxy

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// errNoIdentity says that the workload behind a connection is known, and has no identity by the word of who issues them.
var errNoIdentity = errors.New("the workload has no identity")

// workload is who has the client's end of a connection of this node, as the agent attests it.
type workload struct {
	id  spiffeid.ID // zero: nobody attests it
	why string      // it has no identity
	// svid has a key that is the agent's: it signs through the agent. nil: the agent gives none for this server.
	svid *x509svid.SVID
}

// workload asks the agent whose the client's end of a connection is; as is whom we speak as for it, if we do. errNoIdentity is in the
// error if that is known and may not be what it was; any other error says nothing about it.
func (o *Outside) workload(ctx context.Context, client, server netip.AddrPort, as spiffeid.ID) (w workload, err error) {
	connection := &api.CallerRequest{Protocol: "tcp", Client: bare(client).String(), Server: bare(server).String(), Identity: as.String()}
	reply, err := api.NewProxyReportClient(o.conn).Caller(ctx, connection)
	switch {
	case status.Code(err) == codes.PermissionDenied:
		return workload{}, fmt.Errorf("%w: %s", errNoIdentity, status.Convert(err).Message())
	case err != nil:
		return workload{}, fmt.Errorf("ask the agent whose the connection is: %w", err)
	case reply.GetCaller() == nil:
		return workload{why: "the client is not on this node"}, nil
	}
	w.why = reply.GetCaller().GetWhy()
	if id := reply.GetCaller().GetIdentity(); id != "" {
		if w.id, err = spiffeid.FromString(id); err != nil {
			return workload{}, fmt.Errorf("ask the agent whose the connection is: %w", err)
		}
	}
	if len(reply.GetChain()) > 0 {
		w.svid, err = o.svid(connection, w.id, reply.GetChain())
	}
	return w, err
}

// svid is what the agent has told, with a key that asks it to sign.
func (o *Outside) svid(connection *api.CallerRequest, id spiffeid.ID, raw [][]byte) (*x509svid.SVID, error) {
	chain := make([]*x509.Certificate, 0, len(raw))
	for _, der := range raw {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read the workload's certificate from the agent: %w", err)
		}
		chain = append(chain, cert)
	}
	if got, err := x509svid.IDFromCert(chain[0]); err != nil || got != id {
		return nil, fmt.Errorf("read the workload's certificate from the agent: it is of %s, not of %s", got, id)
	}
	leaf := sha256.Sum256(raw[0])
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: &agentKey{o, connection, leaf[:], chain[0].PublicKey}}, nil
}

// agentKey is a private key that stays with the agent.
type agentKey struct {
	outside    *Outside
	connection *api.CallerRequest
	leaf       []byte
	public     crypto.PublicKey
}

// signTime bounds a signature: TLS does not say how long it would wait.
const signTime = 5 * time.Second

// Public implements crypto.Signer.
func (k *agentKey) Public() crypto.PublicKey { return k.public }

// Sign implements crypto.Signer.
func (k *agentKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), signTime)
	defer cancel()
	_, pss := opts.(*rsa.PSSOptions)
	reply, err := api.NewProxyReportClient(k.outside.conn).Sign(ctx, &api.SignRequest{
		Connection: k.connection, Leaf: k.leaf, Digest: digest, Hash: uint32(opts.HashFunc()), Pss: pss})
	if err != nil {
		return nil, fmt.Errorf("have the agent sign as the workload: %s", status.Convert(err).Message())
	}
	return reply.GetSignature(), nil
}
