package grant

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// ErrNotSigned says that OpenSSH did not sign: nobody touched the security key, a wrong passphrase, no agent.
var ErrNotSigned = errors.New("not signed")

// SigningKey makes signatures: a PrivateKey, or a key that OpenSSH has.
type SigningKey interface {
	Public() policy.PublicKey
	sign(ctx context.Context, message []byte) ([]byte, error)
}

// SSHKey is a key of OpenSSH: in a file, in its agent, or in a security key. ssh-keygen makes the signature, and asks for
// what it needs on the terminal.
type SSHKey struct {
	file   string
	public policy.PublicKey
	talk   io.Writer
}

const (
	armorType  = "SSH SIGNATURE"
	publicFile = ".pub"
)

// ReadSigningKey finds out what a file holds: a key as sallyport keygen makes it, or one of OpenSSH, either half. What
// OpenSSH says while it signs goes to talk.
func ReadSigningKey(path string, talk io.Writer) (SigningKey, error) {
	head, err := readHead(path)
	if err != nil {
		return nil, &policy.Error{File: path, Msg: "read private key: " + cause(err), Hint: "check the path, and who owns the file", Err: err}
	}
	if !strings.HasPrefix(head, "-----BEGIN OPENSSH PRIVATE KEY-----") && !strings.HasSuffix(path, publicFile) {
		return ReadPrivateKey(path)
	}
	public, err := readSSHPublic(strings.TrimSuffix(path, publicFile) + publicFile)
	if err != nil {
		return nil, err
	}
	return SSHKey{file: path, public: public, talk: talk}, nil
}

// readHead is enough of a file to tell what it is.
func readHead(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 64)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return "", err
	}
	return string(head[:n]), nil
}

// readSSHPublic reads a .pub file: type, key, and a comment that nobody needs.
func readSSHPublic(path string) (policy.PublicKey, error) {
	const hint = "put the public half beside it: ssh-keygen -y -f KEY > KEY.pub"
	text, err := os.ReadFile(path)
	if err != nil {
		return policy.PublicKey{}, &policy.Error{File: path, Msg: "read public key: " + cause(err), Hint: hint, Err: err}
	}
	words := strings.Fields(string(text))
	if len(words) < 2 {
		return policy.PublicKey{}, &policy.Error{File: path, Msg: "read public key: it has no key", Hint: hint, Err: ErrKeyFile}
	}
	k, err := policy.ParsePublicKey(words[0] + " " + words[1])
	if e, ok := errors.AsType[*policy.Error](err); ok {
		e.File = path
	}
	return k, err
}

// Public is the key's public half, as it stands in a Keyring.
func (k SSHKey) Public() policy.PublicKey { return k.public }

func (k SSHKey) sign(ctx context.Context, message []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "ssh-keygen", "-Y", "sign", "-n", policy.SSHNamespace, "-f", k.file)
	var said bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(message), io.MultiWriter(&said, k.talk)
	armored, err := cmd.Output()
	if err != nil {
		return nil, &policy.Error{File: k.file, Msg: fmt.Sprintf("ssh-keygen did not sign: %v: %s", err, lastLine(said.String())),
			Hint: "unlock the key, touch the device, or add it to ssh-agent", Err: ErrNotSigned}
	}
	block, _ := pem.Decode(armored)
	if block == nil || block.Type != armorType || !k.public.Verify(message, block.Bytes) {
		return nil, &policy.Error{File: k.file, Msg: "ssh-keygen gave no signature of this key", Hint: "check that the .pub file beside it is its own", Err: ErrNotSigned}
	}
	return block.Bytes, nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}
