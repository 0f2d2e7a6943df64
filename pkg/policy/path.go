package policy

import (
	"fmt"
	"strings"
)

// CanonicalPath gives the one spelling of a request's path, without query, in which it is judged and has to be sent on: with
// escapes only where they are needed, in upper case, and without empty, . and .. segments. What servers read in different ways
// is an error: an escaped slash, backslash, NUL or control character, an escape within an escape, . and .. with parameters, and
// a .. above the root.
func CanonicalPath(path string) (string, error) {
	if !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("path %q does not begin with /", cut(path))
	}
	plain, err := plainEscapes(path)
	if err != nil {
		return "", err
	}
	var out []string
	parts := strings.Split(plain[1:], "/")
	for i, part := range parts {
		name, _, parameters := strings.Cut(part, ";")
		last := i == len(parts)-1
		switch {
		case parameters && (name == "" || name == "." || name == ".."):
			return "", fmt.Errorf("path %q has parameters at a segment without a name", cut(path))
		case part == ".." && len(out) == 0:
			return "", fmt.Errorf("path %q goes above the root", cut(path))
		case part == "..":
			out = out[:len(out)-1]
		case part != "" && part != ".":
			out = append(out, part)
			continue
		}
		if last { // it names what is below
			out = append(out, "")
		}
	}
	return "/" + strings.Join(out, "/"), nil
}

const upperHex = "0123456789ABCDEF"

// plainEscapes takes the escapes out of a path that need not be there, and writes the others in upper case.
func plainEscapes(path string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c != '%' {
			if !pathByte(c) {
				return "", fmt.Errorf("path %q has a byte 0x%02x that has to be escaped", cut(path), c)
			}
			b.WriteByte(c)
			continue
		}
		v, ok := escaped(path[i:])
		if !ok {
			return "", fmt.Errorf("path %q has a %% that begins no escape", cut(path))
		}
		i += 2
		switch {
		case v == '/' || v == '\\' || v < 0x20 || v == 0x7f:
			return "", fmt.Errorf("path %q escapes 0x%02x, which servers read in different ways", cut(path), v)
		case unreserved(v):
			b.WriteByte(v)
		default:
			b.WriteString("%" + string(upperHex[v>>4]) + string(upperHex[v&15]))
		}
	}
	out := b.String()
	for _, rest := range strings.Split(out, "%25")[1:] {
		if _, ok := escaped("%" + rest); ok {
			return "", fmt.Errorf("path %q has an escape within an escape", cut(path))
		}
	}
	return out, nil
}

// escaped reads an escape at the head of s.
func escaped(s string) (v byte, ok bool) {
	if len(s) < 3 {
		return 0, false
	}
	high, low := hexDigit(s[1]), hexDigit(s[2])
	return byte(high<<4 | low), high >= 0 && low >= 0
}

func hexDigit(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return int(c|0x20-'a') + 10
	}
	return -1
}

func unreserved(c byte) bool {
	return 'a' <= c|0x20 && c|0x20 <= 'z' || '0' <= c && c <= '9' || strings.IndexByte("-._~", c) >= 0
}

// pathByte tells what a path may have as it is.
func pathByte(c byte) bool { return unreserved(c) || strings.IndexByte("!$&'()*+,;=:@/", c) >= 0 }
