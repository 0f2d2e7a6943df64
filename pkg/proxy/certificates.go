package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Certificates are web certificates, for clients that know no SPIFFE. They are read again when their files change; the last good
// one stays in use.
type Certificates struct {
	log   *slog.Logger
	files []policy.WebCertificate

	mu   sync.Mutex
	read map[string]*webCertificate // guarded by mu; by name
}

// webCertificate is what was read of one.
type webCertificate struct {
	cert, key []byte // good or bad
	loaded    *tls.Certificate
	trouble   error // with what was read last
	told      bool  // that it ends soon, or has ended
}

const fileHint = "the proxy's user must be able to read both files, in PEM, and the key must be the certificate's"

// endsSoon is when there is time left to renew a web certificate by hand: a week before its end, and a third of its time for one of short life.
func (w *webCertificate) endsSoon(now time.Time) bool {
	leaf := w.loaded.Leaf
	return now.Add(min(7*24*time.Hour, leaf.NotAfter.Sub(leaf.NotBefore)/3)).After(leaf.NotAfter)
}

// NewCertificates reads them once. That one cannot be read is no error: the clients of the services that name it are refused
// until it can.
func NewCertificates(files []policy.WebCertificate, log *slog.Logger) *Certificates {
	c := &Certificates{log: log, files: files, read: map[string]*webCertificate{}}
	c.look()
	return c
}

// Run looks at the files until ctx ends, and returns nil then.
func (c *Certificates) Run(ctx context.Context) error {
	tick := time.NewTicker(resync)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			c.look()
		case <-ctx.Done():
			return nil
		}
	}
}

// Get finds a certificate by its name.
func (c *Certificates) Get(name string) (*tls.Certificate, error) {
	if c == nil {
		return nil, unknownCertificate(name)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	read := c.read[name]
	switch {
	case read == nil:
		return nil, unknownCertificate(name)
	case read.loaded == nil:
		return nil, read.trouble
	}
	return read.loaded, nil
}

func unknownCertificate(name string) error {
	return fmt.Errorf("no web certificate is named %q: add it to spec.proxy.certificates of the node's AgentConfig", name)
}

// states tells of each, by its place in the configuration.
func (c *Certificates) states(now time.Time) (all []*api.WebCertificate) {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.files {
		read := c.read[f.Name]
		s := &api.WebCertificate{Name: f.Name, Problem: read.problem(now)}
		if read.loaded != nil {
			s.Until = timestamppb.New(read.loaded.Leaf.NotAfter)
		}
		all = append(all, s)
	}
	return all
}

// problem is what there is to do about it, if anything.
func (w *webCertificate) problem(now time.Time) string {
	const renew = "see why it was not renewed; a new one is in use 5 s after it is there, without a restart"
	switch {
	case w.loaded == nil:
		return fmt.Sprintf("clients of services that name it are refused: %s; %s", w.trouble, fileHint)
	case now.After(w.loaded.Leaf.NotAfter):
		return "it has ended, and browsers refuse it; " + renew
	case w.trouble != nil:
		return fmt.Sprintf("the last good one stays in use: %s; %s", w.trouble, fileHint)
	case w.endsSoon(now):
		return "it ends soon; " + renew
	}
	return ""
}

// look reads all files: a mount that is swapped as a whole raises no event at the file, and they are small.
func (c *Certificates) look() {
	for _, f := range c.files {
		cert, certErr := os.ReadFile(f.CertFile)
		key, keyErr := os.ReadFile(f.KeyFile)
		c.take(f, cert, key, errors.Join(certErr, keyErr))
		c.warn(f, time.Now())
	}
}

// warn says once of a certificate that its end is near: nothing has put a newer one in its place.
func (c *Certificates) warn(f policy.WebCertificate, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	read := c.read[f.Name]
	if read.loaded == nil || read.told || !read.endsSoon(now) {
		return
	}
	read.told = true
	c.log.Warn("web certificate ends soon", "name", f.Name, "until", read.loaded.Leaf.NotAfter, "file", f.CertFile,
		"hint", "see why it was not renewed; a new one is in use 5 s after it is there, without a restart")
}

func (c *Certificates) take(f policy.WebCertificate, cert, key []byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.read[f.Name]
	if before != nil && bytes.Equal(before.cert, cert) && bytes.Equal(before.key, key) {
		return
	}
	now := &webCertificate{cert: cert, key: key}
	c.read[f.Name] = now
	var pair tls.Certificate
	if err == nil {
		pair, err = tls.X509KeyPair(cert, key)
	}
	if err == nil {
		now.loaded = &pair
		c.log.Info("web certificate in use", "name", f.Name, "until", pair.Leaf.NotAfter)
		return
	}
	now.trouble = fmt.Errorf("read web certificate %s from %s and %s: %w", f.Name, f.CertFile, f.KeyFile, err)
	if before == nil || before.loaded == nil {
		c.log.Error("no web certificate: clients of services that name it are refused", "name", f.Name, "error", now.trouble, "hint", fileHint)
		return
	}
	now.loaded = before.loaded
	c.log.Error("keep last good web certificate", "name", f.Name, "until", now.loaded.Leaf.NotAfter, "error", now.trouble, "hint", fileHint)
}
