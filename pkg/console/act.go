package console

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// acted is what came of an act.
type acted struct {
	Done         bool
	What         string // was done, or refused
	Words        []string
	Next         string
	Grant, State string
	Node         string
}

func (c *console) revoke(r *http.Request) (answer, error) {
	if err := postForm(r); err != nil {
		return answer{}, err
	}
	node, id, why := posted(r, "node"), posted(r, "grant"), posted(r, "why")
	switch {
	case node == "" || id == "":
		return answer{}, &problem{http.StatusBadRequest, "Nothing was revoked", "The form named no grant and node.", "Open the grant's page and revoke it there."}
	case why == "":
		return answer{}, &problem{http.StatusBadRequest, "Nothing was revoked", "The record needs a reason.", "Go back, and say why."}
	}
	return c.act(r, "Revoke", id, &api.ActRequest{Node: node, What: &api.ActRequest_Revoke{Revoke: &api.Revocation{Grant: id, Why: why}}})
}

func (c *console) statement(r *http.Request) (answer, error) {
	if err := postForm(r); err != nil {
		return answer{}, err
	}
	node := posted(r, "node")
	signed, err := statementOf(r)
	if err != nil {
		return answer{}, err
	}
	if node == "" {
		return answer{}, &problem{http.StatusBadRequest, "Nothing was handed in", "No node was named.", "Open the grant's page, and hand the statement in there."}
	}
	said, err := grant.PeekStatement(signed)
	if err != nil {
		return answer{}, &problem{http.StatusBadRequest, "That is no statement", err.Error(), "Hand in what `sallyport grant review GRANT --key KEY --why TEXT --out FILE` wrote, or withdraw and deny."}
	}
	return c.act(r, fmt.Sprintf("Hand in “%s” by %s", said.Step, said.By), said.Grant, &api.ActRequest{Node: node, What: &api.ActRequest_Statement{Statement: signed}})
}

// statementOf takes the file that was chosen, or else the text.
func statementOf(r *http.Request) ([]byte, error) {
	text := []byte(posted(r, "statement"))
	file, _, err := r.FormFile("file")
	switch {
	case err == nil:
		defer file.Close()
		data, err := io.ReadAll(io.LimitReader(file, maxStatementIn+1))
		if err != nil {
			return nil, wrongInput("The file could not be read.", "Choose it again.")
		}
		if len(data) > 0 {
			text = data
		}
	case !errors.Is(err, http.ErrMissingFile) && !errors.Is(err, http.ErrNotMultipart):
		return nil, wrongInput("The file could not be read.", "Choose it again.")
	}
	if len(text) == 0 || len(text) > maxStatementIn {
		return nil, &problem{http.StatusBadRequest, "Nothing was handed in", fmt.Sprintf("A statement has from 1 to %d bytes.", maxStatementIn), "Paste it, or choose its file."}
	}
	return text, nil
}

// postForm reads what was posted, within bounds.
func postForm(r *http.Request) error {
	err := r.ParseForm()
	if err == nil {
		err = r.ParseMultipartForm(maxForm)
	}
	if err != nil && !errors.Is(err, http.ErrNotMultipart) {
		return &problem{http.StatusBadRequest, "Nothing was done", "What was sent is too large, or no form of this page.", "Open the page again and fill it in there."}
	}
	return nil
}

func posted(r *http.Request, name string) string { return strings.TrimSpace(r.PostFormValue(name)) }

// act asks the collector, and shows the node's answer as it is.
func (c *console) act(r *http.Request, what, id string, ask *api.ActRequest) (answer, error) {
	reply, err := c.cfg.Audit.Act(r.Context(), ask)
	if err != nil {
		p := inWords(err)
		a := acted{What: what, Next: p.Next, Grant: id, Node: ask.GetNode()}
		for line := range strings.Lines(status.Convert(err).Message()) {
			if hint, ok := strings.CutPrefix(strings.TrimSpace(line), "hint: "); ok {
				a.Next = hint
			} else {
				a.Words = append(a.Words, strings.TrimSpace(line))
			}
		}
		return answer{name: "acted", title: "Not done", data: a, code: p.code}, nil
	}
	state := reply.GetGrant().GetState()
	if state == "" {
		state = "never activated on this node"
	}
	return answer{name: "acted", title: "Done", data: acted{Done: true, What: what, Grant: id, Node: ask.GetNode(), State: state,
		Words: nonEmpty(reply.GetGrant().GetEndedWhy()), Next: "It is durable on the node. Its record comes to the collector within seconds."}}, nil
}

func nonEmpty(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}
