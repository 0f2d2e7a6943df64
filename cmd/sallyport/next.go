package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// othersKey stands for a key that only another person can name.
const othersKey = "KEY"

// signedGrant is a grant that was just signed by one more, or joined.
type signedGrant struct {
	payload  grant.Payload
	envelope []byte
	key      string // file of the requester's key, or othersKey
	standing
}

// standing is what resources say of a grant that only signatures may be missing for.
type standing struct {
	resources []string                 // none: nobody has looked
	missing   []policy.MissingApproval // approvals
}

// nextStep is what comes after a signature, for people and machines.
type nextStep struct {
	Grant   string                   `json:"grant"`
	File    string                   `json:"file"`
	Checked bool                     `json:"checked"` // against resources; else approvals may be missing
	Missing []policy.MissingApproval `json:"missing"`
	Next    string                   `json:"next"`
	By      string                   `json:"by"`
}

// write writes the grant to a new file, and says who has to do what now. Without a file it goes to standard output.
func (c *cli) write(path string, g signedGrant) error {
	envelope := append(g.envelope, '\n')
	if path == "" {
		_, err := c.stdout.Write(envelope)
		return err
	}
	if err := writeNew(path, envelope); err != nil {
		return withHint(fmt.Errorf("write grant: %w", err), "name a new file with --out")
	}
	n := next(path, g)
	return c.show(n, func(t *table) { n.table(t, path, g) })
}

func (n nextStep) table(t *table, path string, g signedGrant) {
	t.row("grant", n.Grant)
	t.row("file", n.File)
	missingRows(t, n.Missing)
	if !n.Checked {
		t.row("approvals", "not checked here: --policy says whose are missing; the node refuses it without them")
	}
	t.row("next", n.Next)
	t.row("by", n.By)
	if count(n.Missing) > 1 {
		t.row("or", "each signs a copy of "+filepath.Base(path)+", and then: "+commandLine("grant", "join", "FILE", "FILE", g.policyFlags(), "--out", numbered(path)))
	}
}

func next(path string, g signedGrant) nextStep {
	n := nextStep{Grant: g.payload.ID, File: path, Checked: len(g.resources) > 0, Missing: append([]policy.MissingApproval{}, g.missing...)}
	if len(n.Missing) > 0 {
		n.Next = commandLine("grant", "approve", path, "--key", othersKey, g.policyFlags(), "--out", numbered(path))
		n.By = oneOfPeople(n.Missing) + ", with a KEY of theirs"
		return n
	}
	n.Next = commandLine("grant", "activate", path, "--key", g.key)
	n.By = g.payload.Requester + " on " + g.payload.Audience + choose(g.key == othersKey, ", with a KEY of theirs", "")
	return n
}

func (s standing) policyFlags() []string { return repeated("--policy", s.resources) }

// repeated is a flag with each of its values.
func repeated(flag string, values []string) (words []string) {
	for _, v := range values {
		words = append(words, flag, v)
	}
	return words
}

// missingRows say which approvals are missing.
func missingRows(t *table, missing []policy.MissingApproval) {
	for _, m := range missing {
		people := strings.Join(m.People, ", ")
		t.row("missing", fmt.Sprintf("%s by %s: %s", plural(m.Count, "approval"), strings.Join(m.From, ", "),
			either(people, "nobody is left whose key counts")))
	}
}

func count(missing []policy.MissingApproval) (n int) {
	for _, m := range missing {
		n += m.Count
	}
	return n
}

// oneOfPeople are those whom the first missing approval can be of.
func oneOfPeople(missing []policy.MissingApproval) string {
	for _, m := range missing {
		if len(m.People) > 0 {
			return strings.Join(m.People, " or ")
		}
	}
	return "nobody whose key counts"
}

var numberedName = regexp.MustCompile(`^(.*?)(?:\.([0-9]{1,4}))?(\.[^.0-9][^.]*)?$`)

// numbered is a file beside path that is not there yet: backup.grant, backup.2.grant, backup.3.grant.
func numbered(path string) string {
	dir, base := filepath.Split(path)
	parts := numberedName.FindStringSubmatch(base)
	if parts == nil {
		parts = []string{base, base, "", ""}
	}
	n, _ := strconv.Atoi(parts[2])
	for n = max(n, 1) + 1; ; n++ {
		name := dir + parts[1] + "." + strconv.Itoa(n) + parts[3]
		if _, err := os.Lstat(name); err != nil {
			return name
		}
	}
}

// commandLine is one of ours that a shell reads as it stands. Each part is a word or several.
func commandLine(parts ...any) string {
	words := []string{"sallyport"}
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			words = append(words, quote(p))
		case []string:
			for _, w := range p {
				words = append(words, quote(w))
			}
		}
	}
	return strings.Join(words, " ")
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// quote writes one word for a shell.
func quote(word string) string {
	if plainWord.MatchString(word) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}
