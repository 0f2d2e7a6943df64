package oidc

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"

	"golang.org/x/net/html"
)

// maxPages is more than any login takes.
const maxPages = 12

// Person answers the provider's pages as a person of that name does who agrees to everything, from an address on, and gives the text
// of the last page. It follows where the provider sends a browser.
func (p *Provider) Person(name, address string) (string, error) {
	jar, err := cookiejar.New(nil)
	if err != nil {
		return "", err
	}
	browser := &http.Client{Transport: p.client.Transport, Timeout: p.client.Timeout, Jar: jar}
	answer, err := browser.Get(address)
	for range maxPages {
		if err != nil {
			return "", err
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil {
			return "", err
		}
		action, fields, ok := form(string(body))
		if !ok || answer.Request.URL.Host != p.Endpoint {
			return string(body), nil
		}
		if fields.Has("login") {
			fields.Set("login", name)
			fields.Set("password", "any")
		}
		where, err := answer.Request.URL.Parse(action)
		if err != nil {
			return "", err
		}
		if answer, err = browser.PostForm(where.String(), fields); err != nil {
			return "", fmt.Errorf("answer %s: %w", where, err)
		}
	}
	return "", errors.New("the provider asks for ever")
}

// form is the first form of a page, as it would be sent without anything entered.
func form(page string) (action string, fields url.Values, ok bool) {
	fields = url.Values{}
	for z := html.NewTokenizer(strings.NewReader(page)); ; {
		switch z.Next() {
		case html.ErrorToken:
			return action, fields, ok
		case html.EndTagToken:
			if t := z.Token(); t.Data == "form" && ok {
				return action, fields, ok
			}
		case html.StartTagToken, html.SelfClosingTagToken:
			t := z.Token()
			attributes := map[string]string{}
			for _, a := range t.Attr {
				attributes[a.Key] = a.Val
			}
			switch {
			case t.Data == "form" && !ok:
				action, ok = attributes["action"], true
			case t.Data == "input" && ok && attributes["name"] != "":
				fields.Set(attributes["name"], attributes["value"])
			}
		}
	}
}
