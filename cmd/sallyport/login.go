package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/userlogin"
)

// defaultLogin is the name of a login that was given none.
const defaultLogin = "default"

// loginFlags say where somebody logs in.
type loginFlags struct {
	userlogin.Client
	as, caFile string
	device     bool
}

func (c *cli) login() *cobra.Command {
	var flags loginFlags
	cmd := &cobra.Command{
		Use:   "login",
		Short: "Log in at an OpenID Connect provider, for connect and forward with --login",
		Long: `Log in at an OpenID Connect provider and keep the token, in a file that only you can read, below
XDG_STATE_HOME or ~/.local/state. By default a browser on this machine is asked for; with --device
one elsewhere. A login that is kept under the same name is replaced, and its provider need not be
named again. connect and forward show the token with --login, and renew it where the provider lets
them.`,
		Example: `  sallyport login --provider https://login.example.org --client-id sallyport
  sallyport login --device`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.runLogin(cmd.Context(), flags) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&flags.Issuer, "provider", "", "`URL` of the provider: its issuer")
	f.StringVar(&flags.ID, "client-id", "", "`ID` that the provider knows this command by")
	f.StringVar(&flags.SecretFile, "client-secret-file", "", "`FILE` with the client's secret, if it has one")
	f.StringVar(&flags.caFile, "ca", "", "`FILE` with the CA of the provider's certificate (default: the system's)")
	f.StringSliceVar(&flags.Scopes, "scope", nil, "`SCOPES` beside openid (default: offline_access, where the provider has it)")
	f.StringVar(&flags.Resource, "resource", "", "`URI` that the access token must be for")
	f.StringVar(&flags.Show, "show", userlogin.ShowAccess, "`TOKEN` that services are shown: access or id")
	f.BoolVar(&flags.device, "device", false, "log in by a browser elsewhere")
	f.StringVar(&flags.as, "as", defaultLogin, "`NAME` to keep the login under")
	fixed(cmd, "show", []string{userlogin.ShowAccess, userlogin.ShowID})
	return cmd
}

func (c *cli) runLogin(ctx context.Context, flags loginFlags) error {
	store, err := c.logins()
	if err != nil {
		return err
	}
	who, err := flags.client(store)
	if err != nil {
		return err
	}
	provider, err := userlogin.Discover(ctx, who)
	if err != nil {
		return loginHint(err, flags.as)
	}
	var kept userlogin.Kept
	if flags.device {
		kept, err = provider.Device(ctx, c.sayDevice)
	} else {
		kept, err = provider.Browser(ctx, func(address string) {
			c.note("open this address in a browser on this machine, or use --device:\n%s", address)
		})
	}
	if err != nil {
		return loginHint(err, flags.as)
	}
	if err := store.Save(flags.as, kept); err != nil {
		return err
	}
	return c.show(shown(flags.as, kept), func(t *table) {
		t.line("logged in as %s until %s", escape(personOf(kept)), kept.Expires.UTC().Format(time.RFC3339))
	})
}

func (c *cli) sayDevice(address, code, whole string) {
	c.note("open %s in a browser anywhere, and enter the code %s", address, code)
	if whole != "" {
		c.note("or open %s", whole)
	}
}

// client is what the flags say, or what the login that is kept was made with.
func (f loginFlags) client(store userlogin.Store) (userlogin.Client, error) {
	if f.Show != userlogin.ShowAccess && f.Show != userlogin.ShowID {
		return userlogin.Client{}, withHint(usagef("read --show %q: no such token", f.Show), "write --show access or --show id")
	}
	if f.Issuer == "" && f.ID == "" {
		kept, err := store.Load(f.as)
		if errors.Is(err, userlogin.ErrNoLogin) {
			return userlogin.Client{}, withHint(usagef("log in: no provider is named"), "name it: --provider https://login.example.org --client-id ID")
		}
		return kept.Client, err
	}
	if f.Issuer == "" || f.ID == "" {
		return userlogin.Client{}, withHint(usagef("log in: --provider and --client-id go together"), "name both: --provider https://login.example.org --client-id ID")
	}
	if f.SecretFile != "" {
		path, err := filepath.Abs(f.SecretFile)
		if err != nil {
			return userlogin.Client{}, fmt.Errorf("find the client's secret: %w", err)
		}
		f.SecretFile = path // it is read again when the login is renewed, from wherever
	}
	ca, err := readCA(f.caFile)
	f.CA = ca
	return f.Client, err
}

func readCA(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read CA: %w", err)
	}
	return string(pem), nil
}

// logins are those of the user who calls.
func (c *cli) logins() (userlogin.Store, error) {
	state := c.getenv("XDG_STATE_HOME")
	if home := c.getenv("HOME"); state == "" && home != "" {
		state = filepath.Join(home, ".local", "state")
	}
	if !filepath.IsAbs(state) {
		return userlogin.Store{}, withHint(usagef("find the kept logins: there is no home directory"), "set HOME or XDG_STATE_HOME")
	}
	return userlogin.Store{Dir: filepath.Join(state, "sallyport", "logins"), Now: c.now}, nil
}

func (c *cli) logout() *cobra.Command {
	return &cobra.Command{
		Use:   "logout [NAME]",
		Short: "Forget a login, and tell its provider",
		Example: `  sallyport logout
  sallyport logout work`,
		Args: between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := strings.Join(append(args, defaultLogin)[:1], "")
			store, err := c.logins()
			if err != nil {
				return err
			}
			was, err := store.Remove(name)
			if errors.Is(err, userlogin.ErrNoLogin) {
				return loginHint(err, name)
			}
			if err != nil {
				return fmt.Errorf("forget login: %w", err)
			}
			if was.Refresh != "" {
				c.revoke(cmd.Context(), was)
			}
			return c.show(map[string]string{"loggedOut": name}, func(t *table) { t.line("logged out: %s", name) })
		},
	}
}

// revoke is as well as it can be: the login is forgotten here, whatever the provider says.
func (c *cli) revoke(ctx context.Context, kept userlogin.Kept) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	provider, err := userlogin.Discover(ctx, kept.Client)
	if err == nil {
		err = provider.Revoke(ctx, kept)
	}
	if err != nil {
		c.note("the provider was not told, so that what it gave counts there until it expires: %v", err)
	}
}

// shownLogin is a login without its secrets.
type shownLogin struct {
	Name     string    `json:"name"`
	Provider string    `json:"provider"`
	Subject  string    `json:"subject"`
	Audience []string  `json:"audience,omitempty"`
	Expires  time.Time `json:"expires"`
	Renews   bool      `json:"renews"`
}

func shown(name string, k userlogin.Kept) shownLogin {
	return shownLogin{Name: name, Provider: k.Client.Issuer, Subject: k.Subject, Audience: k.Audience, Expires: k.Expires.UTC(), Renews: k.Refresh != ""}
}

func personOf(k userlogin.Kept) string { return k.Subject + " of " + k.Client.Issuer }

func (c *cli) whoami() *cobra.Command {
	return &cobra.Command{
		Use:     "whoami",
		Short:   "Who is logged in here, for whom the tokens are, and until when",
		Example: "  sallyport whoami",
		Args:    exactly(0),
		RunE: func(*cobra.Command, []string) error {
			store, err := c.logins()
			if err != nil {
				return err
			}
			names, err := store.Names()
			if err != nil {
				return fmt.Errorf("list logins: %w", err)
			}
			all := make([]shownLogin, 0, len(names))
			for _, name := range names {
				k, err := store.Load(name)
				if err != nil {
					return err
				}
				all = append(all, shown(name, k))
			}
			if len(all) == 0 {
				c.note("nobody is logged in: `sallyport login --provider URL --client-id ID`")
			}
			return c.show(all, func(t *table) { c.loginTable(t, all) })
		},
	}
}

func (c *cli) loginTable(t *table, all []shownLogin) {
	t.row("NAME", "WHO", "PROVIDER", "FOR", "UNTIL", "THEN")
	for _, l := range all {
		then := "log in again"
		if l.Renews {
			then = "renewed when it is used"
		}
		until := l.Expires.Format(time.RFC3339)
		if !c.now().Before(l.Expires) {
			until += " (expired)"
		}
		t.row(l.Name, l.Subject, l.Provider, strings.Join(l.Audience, ","), until, then)
	}
}

// loginHint adds the next step to what is wrong with a login.
func loginHint(err error, name string) error {
	again := "`sallyport login --as " + name + "`"
	switch {
	case errors.Is(err, userlogin.ErrNoLogin):
		return withHint(refused(err), "log in: `sallyport login --as %s --provider URL --client-id ID`; `sallyport whoami` lists the logins", name)
	case errors.Is(err, userlogin.ErrExpired):
		return withHint(refused(err), "log in again: %s", again)
	case errors.Is(err, userlogin.ErrOpaque):
		return withHint(refused(err), "have it made out for a service with --resource URI, or show the ID token: --show id")
	case errors.Is(err, userlogin.ErrNoDevices):
		return withHint(refused(err), "log in without --device, on a machine with a browser")
	case errors.Is(err, userlogin.ErrRefused):
		return withHint(refused(err), "log in again and agree to it: %s; if that goes on, the provider does not know the client as it is used", again)
	case errors.Is(err, userlogin.ErrAway):
		return withHint(&exitError{exitUnreachable, err}, "check --provider and --ca, and that the provider can be reached from here")
	}
	return err
}
