// Command samlbridge makes an OpenID provider of a SAML identity provider: its login page is that one's, and what it gives is a
// short ID token. Sallyport's proxy is a client of it like of any other provider, and has no code for XML or its signatures.
package main

import (
	"context"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/crewjam/saml"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "samlbridge:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("samlbridge", flag.ContinueOnError)
	listen := flags.String("listen", ":8443", "`address` to listen at")
	cert := flags.String("cert", "", "`file` with the web certificate and its chain, in PEM")
	key := flags.String("key", "", "`file` with the key of the certificate, in PEM")
	issuer := flags.String("issuer", "", "`URL` that this program is reached at: the issuer of its tokens")
	metadata := flags.String("idp", "", "`file` with the metadata of the SAML identity provider")
	groups := flags.String("groups", "groups", "`name` of the SAML attribute that lists groups")
	subject := flags.String("subject", "", "`name` of the SAML attribute that says who it is; empty: the NameID")
	clients := clients{}
	flags.Var(clients, "client", "client and where it is sent back to, as `ID=URL`; may be given several times")
	if err := flags.Parse(args); err != nil {
		return err
	}
	idp, err := readMetadata(*metadata)
	if err != nil {
		return err
	}
	b, err := newBridge(config{issuer: *issuer, idp: idp, clients: clients, groups: *groups, subject: *subject, log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	server := &http.Server{Addr: *listen, Handler: b, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 32 << 10}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.ListenAndServeTLS(*cert, *key); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// readMetadata reads a file that an operator has brought: keys of an identity provider are not fetched by those who trust it.
func readMetadata(file string) (*saml.EntityDescriptor, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the identity provider's metadata: %w; save its metadata to a file and name that with -idp", err)
	}
	if err := plain(text); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	idp := &saml.EntityDescriptor{}
	if err := xml.Unmarshal(text, idp); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return idp, nil
}

// clients are where each client may be sent back to.
type clients map[string][]string

func (c clients) String() string { return "" }

func (c clients) Set(text string) error {
	id, where, _ := strings.Cut(text, "=")
	if u, err := url.Parse(where); id == "" || err != nil || u.Scheme != "https" || u.Host == "" || u.Fragment != "" {
		return fmt.Errorf("%q is no client; write it like app=https://app.example.org/.sallyport/callback", text)
	}
	c[id] = append(c[id], where)
	return nil
}
